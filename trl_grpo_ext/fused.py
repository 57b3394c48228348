"""LoRA layers in fewer passes over memory: `y = x W^T + b + s (x A^T) B^T`, accumulated in place.

PEFT computes the branch, scales it and adds it, each of which reads and writes a whole activation, and asks some twenty
questions in Python first: on a decode step of a few rows that is more time than the branch's products take. Anything
out of the ordinary (several adapters, DoRA, dropout, merged weights, autocast) is PEFT's as before.

On a base that computes in 16 bits (its weights are, or it is quantized), the adapter's float32 weights are cast for the
products: PEFT casts the activations to float32 instead, and keeps those for the backward pass.

Values are the same up to rounding. The model's own weights are never merged, moved or saved differently.
"""

from __future__ import annotations

import types
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.tuners.lora.bnb import Linear4bit as Lora4bit
from peft.tuners.lora.bnb import Linear8bitLt as Lora8bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear

from .allocator import keep_freed_memory
from .elementwise import fuse_elementwise
from .quantized import compute_dtype, keep_quantized

LoraLayer: TypeAlias = LoraLinear | Lora4bit | Lora8bit

Branch: TypeAlias = tuple[torch.Tensor, torch.Tensor, float]  # A (r, in), B (out, r), scaling


class _LoraLinear(torch.autograd.Function):
    """Saves `x` and `x A^T`, as autograd would; the base weight gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,)
        lora_a: torch.Tensor,  # (r, in)
        lora_b: torch.Tensor,  # (out, r)
        scaling: float,
    ) -> torch.Tensor:  # (..., out)
        out, low = _forward(x, weight, bias, lora_a, lora_b, scaling)
        ctx.save_for_backward(x, low, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, weight, lora_a, lora_b = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        flat = x.reshape(-1, weight.shape[1])
        low_grad = (grad @ lora_b).mul_(ctx.scaling)  # (n, r)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(low_grad, lora_a).view(x.shape)
        a_grad = low_grad.t() @ flat
        b_grad = (grad.t() @ low).mul_(ctx.scaling)
        return x_grad, None, None, a_grad, b_grad, None


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    low = flat @ lora_a.t()  # (n, r)
    out = linear(flat, weight, bias)
    out.addmm_(low, lora_b.t(), alpha=scaling)
    return out.view(*x.shape[:-1], -1), low


class _AddBranch(torch.autograd.Function):
    """`out + s (x A^T) B^T`, with the products in `dtype`. Saves `x` as it is: layers that share it share one copy."""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,  # (..., out)
        x: torch.Tensor,  # (..., in)
        lora_a: torch.Tensor,  # (r, in)
        lora_b: torch.Tensor,  # (out, r)
        scaling: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # (..., out)
        low = x.to(dtype) @ lora_a.to(dtype).t()  # (..., r)
        ctx.save_for_backward(x, low, lora_a, lora_b)
        ctx.scaling = scaling
        return torch.add(out, low @ lora_b.to(dtype).t(), alpha=scaling).to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, lora_a, lora_b = ctx.saved_tensors
        dtype = low.dtype
        grad = grads[0].to(dtype).reshape(-1, lora_b.shape[0])
        flat, low = x.to(dtype).reshape(-1, x.shape[-1]), low.reshape(-1, low.shape[-1])
        low_grad = (grad @ lora_b.to(dtype)).mul_(ctx.scaling)  # (n, r)
        x_grad = (low_grad @ lora_a.to(dtype)).to(x.dtype).view(x.shape) if ctx.needs_input_grad[1] else None
        a_grad = (low_grad.t() @ flat).to(lora_a.dtype)
        b_grad = (grad.t() @ low).mul_(ctx.scaling).to(lora_b.dtype)
        return grads[0], x_grad, a_grad, b_grad, None, None


def plain_branch(module: LoraLayer) -> Branch | None:
    """(A, B, scaling) of the one adapter that `module` adds as it is now; None where PEFT has to compute."""
    name = plain_adapter(module)
    if name is None or name in module.lora_variant or module.lora_bias[name]:
        return None
    base, dropout = cast(nn.Linear, module.base_layer), module.lora_dropout[name]
    if (
        base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
        or (module.training and not isinstance(dropout, nn.Identity) and cast(nn.Dropout, dropout).p > 0)
    ):
        return None
    lora_a, lora_b = cast(nn.Linear, module.lora_A[name]).weight, cast(nn.Linear, module.lora_B[name]).weight
    return lora_a, lora_b, module.scaling[name]


def plain_adapter(module: LoraLayer) -> str | None:
    """Name of the one adapter that `module` adds as it is now; None for several, none, or merged weights."""
    adapters = module.active_adapters
    if module.disable_adapters or module.merged or len(adapters) != 1 or adapters[0] not in module.lora_A:
        return None
    return cast(str, adapters[0])


def _fused_forward(self: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    branch = plain_branch(self)
    if args or kwargs or branch is None or torch.is_autocast_enabled(x.device.type):
        return _peft_forward(self, x, *args, **kwargs)
    base = cast(nn.Linear, self.base_layer)
    dtype = compute_dtype(base, x.dtype)
    if type(base) is nn.Linear:
        if x.dtype != dtype:
            return _peft_forward(self, x)
        if branch[0].dtype == branch[1].dtype == dtype:
            if torch.is_grad_enabled():
                return cast(torch.Tensor, _LoraLinear.apply(x, base.weight, base.bias, *branch))
            return _forward(x, base.weight, base.bias, *branch)[0]
    return cast(torch.Tensor, _AddBranch.apply(base(x), x, *branch, dtype))


def _peft_forward(module: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    forward: Any = type(module).forward
    return cast(torch.Tensor, forward(module, x, *args, **kwargs))


def fuse_layers(model: nn.Module) -> None:
    """Let the layers of `model` that this module and `elementwise.py` know compute in fewer passes. Idempotent.

    Quantized layers are kept as they are, see `keep_quantized`.
    """
    keep_quantized(model)
    fuse_elementwise(model)
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        keep_freed_memory()
    for module in model.modules():
        if is_lora_linear(module):
            module.forward = types.MethodType(_fused_forward, module)  # type: ignore[method-assign]


def is_lora_linear(module: nn.Module) -> TypeGuard[LoraLayer]:
    """Whether `module` is PEFT's LoRA on a linear layer, quantized or not."""
    if type(module) not in (LoraLinear, Lora4bit, Lora8bit):
        return False
    layer = cast(LoraLayer, module)
    return not layer.fan_in_fan_out and type(layer.base_layer) in (nn.Linear, Linear4bit, Linear8bitLt)
