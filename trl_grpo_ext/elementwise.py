"""Layers between the matrix products, in fewer passes over memory.

transformers writes each out as a chain of operations, every one of which reads and writes a whole activation, and keeps
what its own backward needs:

- RMSNorm: seven operations, here four;
- the gated MLP (Llama, Qwen, Mistral, ...): `silu(gate) * up` keeps `gate`, `silu(gate)` and `up`, here not
  `silu(gate)`;
- `gelu_new` (GPT-2, Phi, ...): seven operations and five activations; PyTorch has it as one that keeps its input.

Whether a layer computes what its counterpart here does is found by trying it on a few rows, not by its name. Anything
but float32 is left alone: half precision rounds in between, and those roundings are part of the model.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import gelu, silu
from transformers.activations import NewGELUActivation

from .evaluating import evaluating

_TRIAL_ROWS = 3


class _RMSNorm(torch.autograd.Function):
    """`y = w x / rms(x)`; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        # dx = r (w g) - x r^3 mean(w g x)
        weighted = grads[0] * weight
        mean = torch.linalg.vecdot(weighted, x).unsqueeze_(-1).div_(x.shape[-1])
        return weighted.mul_(inverse).addcmul_(x, mean.mul_(inverse.pow(3)), value=-1), None, None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`(..., 1)`: 1 / sqrt(mean(x^2) + eps)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        up_grad = silu(gate).mul_(grads[0]) if ctx.needs_input_grad[1] else None
        gate_grad = torch.ops.aten.silu_backward(grads[0] * up, gate) if ctx.needs_input_grad[0] else None
        return gate_grad, up_grad


def _rms_norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = cast(nn.Parameter, self.weight)
    if x.dtype != torch.float32 or (weight.requires_grad and torch.is_grad_enabled()) or _autocast(x):
        return cast(torch.Tensor, type(self).forward(self, x))
    eps = cast(float, self.variance_epsilon)
    if torch.is_grad_enabled():
        return cast(torch.Tensor, _RMSNorm.apply(x, weight, eps))
    return (x * _inverse_rms(x, eps)).mul_(weight)


def _gated_mlp(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32 or _autocast(x):
        return cast(torch.Tensor, type(self).forward(self, x))
    gate, up = cast(nn.Module, self.gate_proj)(x), cast(nn.Module, self.up_proj)(x)
    product = _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else silu(gate).mul_(up)
    return cast(torch.Tensor, cast(nn.Module, self.down_proj)(product))


def _gelu_new(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


def _autocast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def fuse_elementwise(model: nn.Module) -> None:
    """Let the layers of `model` that this module knows compute in fewer passes. Idempotent."""
    with evaluating(model):  # an adapter's dropout would make two calls differ
        for module in model.modules():
            if "forward" in vars(module):
                continue  # somebody's hook (accelerate's offloading, say), or ours
            if type(module) is NewGELUActivation:
                _replace(module, _gelu_new)
            elif _looks_like_rms_norm(module):
                _replace_if_same(module, _rms_norm, cast(nn.Parameter, module.weight))
            elif _looks_like_gated_mlp(module):
                _replace_if_same(module, _gated_mlp, next(cast(nn.Module, module.gate_proj).parameters()))


def _looks_like_rms_norm(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and isinstance(eps, float) and _takes_one(module)


def _looks_like_gated_mlp(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    drops = any("dropout" in name for name in vars(module))  # of its own, which a trial in evaluation would not see
    return all(isinstance(layer, nn.Module) for layer in layers) and not drops and _takes_one(module)


def _takes_one(module: nn.Module) -> bool:
    """Whether `forward` takes activations and nothing else (not a router's choice of experts, say)."""
    return len(inspect.signature(module.forward).parameters) == 1


def _replace(module: nn.Module, forward: Any) -> None:
    module.forward = types.MethodType(forward, module)


def _replace_if_same(module: nn.Module, forward: Any, parameter: torch.Tensor) -> None:
    if parameter.dtype != torch.float32 or parameter.device.type == "meta":
        return
    width = parameter.shape[-1]
    # Numbers of its own, so that nobody's random state moves; of mixed size, so that eps and the gate matter
    x = torch.linspace(-3, 2, _TRIAL_ROWS * width, device=parameter.device).view(_TRIAL_ROWS, width).roll(width // 3)
    x = x * torch.tensor([1e-3, 1.0, 30.0], device=x.device)[:, None]
    with torch.no_grad():
        expected, found = module(x), forward(module, x)
    if isinstance(expected, torch.Tensor) and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
        _replace(module, forward)
