"""The same layers in fewer passes over memory.

LoRA: `y = x W^T + b + s (x A^T) B^T`, accumulated in place. PEFT computes the branch, scales it and adds it, each of
which reads and writes a whole activation, and asks some twenty questions in Python first: on a decode step of a few
rows that is more time than the branch's products take. Anything out of the ordinary (several adapters, DoRA, dropout,
merged weights, quantized or cast layers, autocast) is PEFT's as before.

`gelu_new` (GPT-2, Phi, ...): transformers writes the tanh approximation of GELU out as seven elementwise operations and
keeps five activations for the backward; PyTorch has it as one function that keeps its input.

Values are the same up to rounding. Nothing is merged, moved or saved differently.
"""

from __future__ import annotations

import types
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn.functional import gelu, linear
from transformers.activations import NewGELUActivation


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


def _fused_forward(self: LoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    adapters = self.active_adapters
    if args or kwargs or self.disable_adapters or self.merged or len(adapters) != 1:
        return _peft_forward(self, x, *args, **kwargs)
    name = adapters[0]
    base = cast(nn.Linear, self.base_layer)
    if name not in self.lora_A or name in self.lora_variant or torch.is_autocast_enabled(x.device.type):
        return _peft_forward(self, x)
    lora_a, lora_b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
    dropout = self.lora_dropout[name]
    weights = (base.weight, lora_a.weight, lora_b.weight)
    if (
        any(weight.dtype != x.dtype for weight in weights)
        or base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
        or self.lora_bias[name]
        or (self.training and not isinstance(dropout, nn.Identity) and cast(nn.Dropout, dropout).p > 0)
    ):
        return _peft_forward(self, x)
    if torch.is_grad_enabled():
        out: torch.Tensor = _LoraLinear.apply(x, weights[0], base.bias, weights[1], weights[2], self.scaling[name])
        return out
    return _forward(x, weights[0], base.bias, weights[1], weights[2], self.scaling[name])[0]


def _peft_forward(module: LoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
    return out


def _fused_gelu(self: NewGELUActivation, x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


def fuse_layers(model: nn.Module) -> None:
    """Let the layers of `model` that this module knows compute in fewer passes. Idempotent."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.forward = types.MethodType(_fused_forward, module)  # type: ignore[method-assign]
        elif type(module) is NewGELUActivation:
            module.forward = types.MethodType(_fused_gelu, module)  # type: ignore[method-assign]
