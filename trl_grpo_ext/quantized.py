"""Quantized base layers (bitsandbytes, 4 and 8 bits) that are read and never written to.

bitsandbytes' own `forward` changes the layer that it computes: it casts the bias in place to the dtype it computes in,
repacks a 4-bit weight for CPUs with AVX512-BF16 in the first evaluation pass (which rounds its scales to bfloat16, and
after which there is no gradient), and moves an 8-bit layer's scales to another object, where PEFT loses them. So layers
get a `forward` of our own here: bitsandbytes' products, and nothing else.

An 8-bit layer on a CPU always multiplies by its dequantized weight, as bitsandbytes does in training; its evaluation
mode rounds activations to 8 bits as well, and completions would be drawn from another policy than the one trained. On
a GPU it is LLM.int8() (arXiv:2208.07339) in both.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from bitsandbytes.autograd._functions import matmul, matmul_4bit
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt, fix_4bit_weight_quant_state_from_module
from torch import nn
from torch.nn.functional import linear

from .allocator import keep_freed_memory

QuantizedLinear: TypeAlias = Linear4bit | Linear8bitLt


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """(name, layer) of every linear layer of `model` that bitsandbytes quantized."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            yield name, module


def keep_quantized(model: nn.Module) -> None:
    """Let the quantized layers of `model` compute without being changed by it, nor hoarding memory. Idempotent.

    Raises:
        ValueError: for weights that bitsandbytes has repacked already, or does not keep in 8 bits.
    """
    for name, layer in quantized_layers(model):
        problem = _problem(layer)
        if problem is not None:
            raise ValueError(f"the base's layer {name} {problem}")
        if vars(layer).get("forward") is None:
            if isinstance(layer, Linear4bit):
                fix_4bit_weight_quant_state_from_module(layer)
                vars(layer)["forward"] = types.MethodType(_forward_4bit, layer)
            else:
                _scales_to_weight(layer)
                vars(layer)["forward"] = types.MethodType(_forward_8bit, layer)
        if layer.weight.device.type == "cpu":
            keep_freed_memory(quantized=True)


def _problem(layer: QuantizedLinear) -> str | None:
    if is_repacked(layer):
        return (
            "has been repacked by bitsandbytes for inference on this CPU (by a forward pass in evaluation mode), which "
            "rounded its scales to bfloat16 and left it without a gradient. Load the model again, and call "
            "model.train() before any forward pass of your own."
        )
    if isinstance(layer, Linear8bitLt) and layer.state.has_fp16_weights:
        return (
            "keeps 16-bit weights and quantizes them in every forward pass (llm_int8_has_fp16_weight=True), which "
            "saves no memory and would train on rounding. Load with llm_int8_has_fp16_weight=False."
        )
    return None


def is_repacked(layer: nn.Module) -> bool:
    """Whether a 4-bit layer has the layout of bitsandbytes' CPU inference."""
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def _scales_to_weight(layer: Linear8bitLt) -> None:
    """An 8-bit layer's scales where it has them before its first pass, and PEFT looks for them in every pass."""
    weight, state = cast(Any, layer.weight), layer.state
    if weight.SCB is None:
        weight.CB, weight.SCB = state.CB, state.SCB


def scales_8bit(layer: Linear8bitLt) -> torch.Tensor:
    """`(out,)`: what a row of the int8 weight, divided by 127, is multiplied by."""
    own = cast(torch.Tensor | None, cast(Any, layer.weight).SCB)
    return cast(torch.Tensor, layer.state.SCB) if own is None else own


def compute_dtype(layer: nn.Module, x_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a linear layer, quantized or not, multiplies in when its input has `x_dtype`."""
    if isinstance(layer, Linear4bit):
        return cast(torch.dtype | None, layer.compute_dtype) or x_dtype
    if isinstance(layer, Linear8bitLt):
        return x_dtype
    return cast(torch.Tensor, layer.weight).dtype


@torch.no_grad()
def dequantized(layer: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the weight, `(out, in)`, in `dtype`: what the layer multiplies by."""
    if isinstance(layer, Linear8bitLt):
        return _dequantize_8bit(layer.weight, scales_8bit(layer), dtype)
    weight = cast(Any, layer.weight)
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    # The op itself, as bitsandbytes' product calls it: `dequantize_4bit` would go by the dtype that was quantized
    return cast(
        torch.Tensor,
        torch.ops.bitsandbytes.dequantize_4bit.default(
            weight.data, absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
        ),
    )


def _dequantize_8bit(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    plain = weight.as_subclass(torch.Tensor)  # Int8Params has a `to` of its own
    return plain.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


class _Linear8bit(torch.autograd.Function):
    """`y = x W^T + b` with a weight that is dequantized in both directions, and kept in neither."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        return linear(x, _dequantize_8bit(weight, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        return grads[0] @ _dequantize_8bit(weight, scales, grads[0].dtype), None, None, None


def _forward_4bit(self: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    dtype = compute_dtype(self, x.dtype)
    frozen, trained = _bias(self, dtype)
    weight = cast(Any, self.weight)
    out = matmul_4bit(x.to(dtype), weight, bias=frozen, quant_state=weight.quant_state)
    return (out if trained is None else out + trained).to(x.dtype)


def _forward_8bit(self: Linear8bitLt, x: torch.Tensor) -> torch.Tensor:
    frozen, trained = _bias(self, x.dtype)
    if x.device.type == "cpu":
        out = _Linear8bit.apply(x, self.weight, scales_8bit(self), frozen)
    else:
        self.state.CB, self.state.SCB, self.state.is_training = self.weight.data, scales_8bit(self), True
        out = matmul(x, self.weight, bias=frozen, state=self.state)
    return cast(torch.Tensor, out if trained is None else out + trained)


def _bias(layer: QuantizedLinear, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(bias for the product, bias to add to it): one that trains is kept from bitsandbytes' gradient, of 2-D rows."""
    own = cast("torch.Tensor | None", layer.bias)
    if own is None:
        return None, None
    bias = own.to(dtype)  # a copy, where theirs casts the layer's own
    return (None, bias) if own.requires_grad else (bias, None)
