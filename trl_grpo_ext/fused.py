"""Linear layers in fewer passes over memory.

LoRA: `y = x W^T + b + s (x A^T) B^T`, accumulated in place. PEFT computes the branch, scales it and adds it, each of
which reads and writes a whole activation, and asks some twenty questions in Python first: on a decode step of a few
rows that is more time than the branch's products take. Anything out of the ordinary (several adapters, DoRA, dropout,
merged weights, quantized or cast layers, autocast) is PEFT's as before.

Decode steps of few rows on a CPU: `W x^T` instead of `x W^T`; and of small models, whose time goes into the number of
operations: one product with a copy of the weights that has the adapter in it (`thin_products`).

Values are the same up to rounding. The model's own weights are never merged, moved or saved differently.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear, pad

from .allocator import keep_freed_memory
from .elementwise import fuse_elementwise

# Decode steps of up to so many rows run as `W x^T` on a CPU, which MKL does faster than `x W^T`: for 24 rows and 100 MB
# of weights on two cores 17 ms against 21, for 48 rows 24 against 35, for 2 rows 7 against 14. Above 8 rows it is fast
# for multiples of 8 only, so rows are padded to one.
_THIN_ROWS = 96

# Copies of weights with the adapter merged into them may take so many bytes in all. They save two products in three:
# rollouts of a 1M model, 128 at a time, take 0.24 s instead of 0.33 on one core. The larger the model, the less the
# adapter's products weigh, and the more the copies would.
_MERGED_BYTES = 32 * 2**20

_Branch = tuple[torch.Tensor, torch.Tensor, float]  # A (r, in), B (out, r), scaling


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


def _plain_branch(module: LoraLinear) -> _Branch | None:
    """(A, B, scaling) of the one adapter that `module` adds as it is now; None where PEFT has to compute."""
    adapters = module.active_adapters
    if module.disable_adapters or module.merged or len(adapters) != 1:
        return None
    name = adapters[0]
    if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
        return None
    base, dropout = cast(nn.Linear, module.base_layer), module.lora_dropout[name]
    lora_a, lora_b = cast(nn.Linear, module.lora_A[name]).weight, cast(nn.Linear, module.lora_B[name]).weight
    if (
        not base.weight.dtype == lora_a.dtype == lora_b.dtype
        or base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
        or (module.training and not isinstance(dropout, nn.Identity) and cast(nn.Dropout, dropout).p > 0)
    ):
        return None
    return lora_a, lora_b, module.scaling[name]


def _fused_forward(self: LoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    branch = _plain_branch(self)
    if args or kwargs or branch is None or x.dtype != branch[0].dtype or torch.is_autocast_enabled(x.device.type):
        return _peft_forward(self, x, *args, **kwargs)
    base = cast(nn.Linear, self.base_layer)
    if torch.is_grad_enabled():
        out: torch.Tensor = _LoraLinear.apply(x, base.weight, base.bias, *branch)
        return out
    return _forward(x, base.weight, base.bias, *branch)[0]


def _peft_forward(module: LoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
    return out


def fuse_layers(model: nn.Module) -> None:
    """Let the layers of `model` that this module and `elementwise.py` know compute in fewer passes. Idempotent."""
    fuse_elementwise(model)
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        keep_freed_memory()
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
            module.forward = types.MethodType(_fused_forward, module)  # type: ignore[method-assign]


@contextmanager
def thin_products(model: nn.Module) -> Iterator[None]:
    """While decoding on a CPU: linear layers of few rows run as `W x^T`, with everything about them settled beforehand.

    Weights and adapters must not change inside. Elsewhere, and under autocast, it does nothing.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        layers = {module: layer for module in model.modules() if (layer := _thin_layer(module))}
        size = sum(base.weight.nbytes for base, branch in layers.values() if branch is not None)
        inner = {module.base_layer for module in model.modules() if isinstance(module, LoraLinear)}
        for module, (base, branch) in layers.items():
            if module in inner:
                continue  # its adapter's layer is replaced as a whole, or not at all
            weight = base.weight.detach()
            # In half precision the sum would round away what a young adapter adds
            if branch is not None and size <= _MERGED_BYTES and weight.dtype == torch.float32:
                weight = torch.addmm(weight, branch[1].detach(), branch[0].detach(), alpha=branch[2])
                branch = None
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _thin_forward(module, base, weight, branch)
    try:
        yield
    finally:
        for module, forward in replaced:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _thin_layer(module: nn.Module) -> tuple[nn.Linear, _Branch | None] | None:
    """(linear layer, adapter on it or None); None for modules that stay as they are."""
    if type(module) is nn.Linear:
        return module, None
    if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.fan_in_fan_out:
        branch = _plain_branch(module)
        return None if branch is None else (module.base_layer, branch)
    return None


def _thin_forward(
    module: nn.Module, base: nn.Linear, weight: torch.Tensor, branch: _Branch | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stand-in for `module.forward`, for as long as its weights stay as they are: `weight` is `base`'s, or a copy."""
    inputs, outputs = base.in_features, base.out_features
    bias = None if base.bias is None else base.bias.detach()
    column_bias = None if bias is None else bias[:, None]
    lora_a, scaled_b = (None, None) if branch is None else (branch[0].detach(), branch[1].detach() * branch[2])
    merged = weight.data_ptr() != base.weight.data_ptr()
    usual = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        count = x.numel() // inputs
        if x.dtype != weight.dtype:
            return cast(torch.Tensor, usual(x))
        if count > _THIN_ROWS:
            return linear(x, weight, bias) if merged else cast(torch.Tensor, usual(x))
        rows = x.reshape(count, inputs).contiguous()  # MKL is slow where the columns are not
        # A single column would be a matrix-vector product, which reads the weights at half the speed
        padded = 2 if count == 1 else count if count <= 8 else -(-count // 8) * 8
        columns = (rows if padded == count else pad(rows, (0, 0, 0, padded - count))).t()  # (in, n)
        out = torch.mm(weight, columns) if column_bias is None else torch.addmm(column_bias, weight, columns)
        if lora_a is not None and scaled_b is not None:
            out.addmm_(scaled_b, torch.mm(lora_a, columns))
        return out.t()[:count].contiguous().view(*x.shape[:-1], outputs)  # from (out, n)

    return forward
