"""The same layers in fewer passes over memory.

LoRA: `y = x W^T + b + s (x A^T) B^T`, accumulated in place. PEFT computes the branch, scales it and adds it, each of
which reads and writes a whole activation, and asks some twenty questions in Python first: on a decode step of a few
rows that is more time than the branch's products take. Anything out of the ordinary (several adapters, DoRA, dropout,
merged weights, quantized or cast layers, autocast) is PEFT's as before.

`gelu_new` (GPT-2, Phi, ...): transformers writes the tanh approximation of GELU out as seven elementwise operations and
keeps five activations for the backward; PyTorch has it as one function that keeps its input.

Decode steps of few rows on a CPU: `W x^T` instead of `x W^T` (`_THIN_ROWS`).

Values are the same up to rounding. Nothing is merged, moved or saved differently.
"""

from __future__ import annotations

import types
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn.functional import gelu, linear, pad
from transformers.activations import NewGELUActivation

# Decode steps of up to so many rows run as `W x^T` on a CPU, which MKL does faster than `x W^T`: for 24 rows and 100 MB of
# weights on two cores 17 ms against 21, for 48 rows 24 against 35, for 2 rows 7 against 14. Above 8 rows it is fast for
# multiples of 8 only, so rows are padded to one.
_THIN_ROWS = 96


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


def _is_thin(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() <= _THIN_ROWS * x.shape[-1] and not torch.is_grad_enabled()


def _thin_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *low_rank: tuple[torch.Tensor, torch.Tensor, float],
) -> torch.Tensor:
    """`linear`, and `low_rank` (A, B, scaling) branches, as weight times activations, for few rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # MKL is slow where the columns are not
    count = len(rows)
    # A single column would be a matrix-vector product, which reads the weights at half the speed
    padded = 2 if count == 1 else count if count <= 8 else -(-count // 8) * 8
    columns = (rows if padded == count else pad(rows, (0, 0, 0, padded - count))).t()  # (in, n)
    out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (out, n)
    for lora_a, lora_b, scaling in low_rank:
        out.addmm_(lora_b, lora_a @ columns, alpha=scaling)
    return out.t()[:count].contiguous().view(*x.shape[:-1], -1)


def _fused_linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if _is_thin(x) and x.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu"):
        return _thin_linear(x, self.weight, self.bias)
    return linear(x, self.weight, self.bias)


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
    if _is_thin(x):
        return _thin_linear(x, weights[0], base.bias, (weights[1], weights[2], self.scaling[name]))
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
        elif type(module) is nn.Linear and "forward" not in module.__dict__:
            module.forward = types.MethodType(_fused_linear, module)  # type: ignore[method-assign]
