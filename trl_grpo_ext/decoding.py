"""Linear layers while completions are drawn: weights and adapters stay as they are, so more is settled beforehand.

- On a CPU, few rows run as `W x^T` instead of `x W^T`; and small models, whose time goes into the number of operations,
  as one product with a copy of the weights that has the adapter in it.
- A quantized layer is dequantized once per call ("layer"), or once for all calls ("resident"), in the dtype that it
  computes in. Its values are the same, its speed is that of an unquantized layer, and the copies, which take what the
  unquantized weights would, are freed at the end.
- DoRA's norms over whole weights are taken once.

Values are the same up to rounding. The model's own weights are never merged, moved or saved differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn.functional import linear, pad

from .fused import Branch, LoraLayer, is_lora_linear, plain_adapter, plain_branch
from .quantized import QuantizedLinear, compute_dtype, dequantized, quantized_layers

# Decode steps of up to so many rows run as `W x^T` on a CPU, which MKL does faster than `x W^T`: for 24 rows and 100 MB
# of weights on two cores 17 ms against 21, for 48 rows 24 against 35, for 2 rows 7 against 14. Above 8 rows it is fast
# for multiples of 8 only, so rows are padded to one.
_THIN_ROWS = 96

# Copies of weights with the adapter merged into them may take so many bytes in all. They save two products in three:
# rollouts of a 1M model, 128 at a time, take 0.24 s instead of 0.33 on one core. The larger the model, the less the
# adapter's products weigh, and the more the copies would.
_MERGED_BYTES = 32 * 2**20

Forward: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def thin_products(model: nn.Module, dequantize: str = "layer") -> Iterator[None]:
    """While decoding: linear layers run with everything about them settled beforehand.

    Weights and adapters must not change inside. Under autocast only "resident" does anything.

    Args:
        dequantize: "layer": a quantized layer's weight is dequantized whenever the layer is called. "resident": once.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    parameter = next(model.parameters(), None)
    if parameter is not None:
        device = parameter.device.type
        with torch.no_grad():
            replacements = [] if torch.is_autocast_enabled(device) else list(_settled_layers(model, device == "cpu"))
            if dequantize == "resident":
                replacements += _resident_layers(model, device == "cpu")
        for module, forward in replacements:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, original in reversed(replaced):
            if original is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = original


def _settled_layers(model: nn.Module, on_cpu: bool) -> Iterator[tuple[nn.Module, Forward]]:
    """(module, what to call instead of its `forward`)."""
    adapted = [module for module in model.modules() if is_lora_linear(module)]
    if on_cpu:
        layers = {module: layer for module in model.modules() if (layer := _linear_layer(module))}
        size = sum(base.weight.nbytes for base, branch in layers.values() if branch is not None)
        inner = {module.base_layer for module in adapted}
        for module, (base, branch) in layers.items():
            if module not in inner:  # its adapter's layer is replaced as a whole, or not at all
                yield module, _thin_layer(module, base, branch, size)
    for module in adapted:
        forward = _settled_branch(module, on_cpu) or _settled_dora(module)
        if forward is not None:
            yield module, forward


def _resident_layers(model: nn.Module, on_cpu: bool) -> Iterator[tuple[nn.Module, Forward]]:
    for _, layer in quantized_layers(model):
        # On a GPU an 8-bit layer rounds its input to 8 bits as well: that is the policy which is trained
        if isinstance(layer, Linear4bit) or on_cpu:
            yield layer, _resident(layer, on_cpu)


def _linear_layer(module: nn.Module) -> tuple[nn.Linear, Branch | None] | None:
    """(unquantized linear layer, adapter on it or None); None for modules that stay as they are."""
    if type(module) is nn.Linear:
        return module, None
    if is_lora_linear(module) and type(module.base_layer) is nn.Linear:
        branch = plain_branch(module)
        return None if branch is None else (module.base_layer, _in_dtype(branch, module.base_layer.weight.dtype))
    return None


def _in_dtype(branch: Branch, dtype: torch.dtype) -> Branch:
    return branch[0].detach().to(dtype), branch[1].detach().to(dtype), branch[2]


def _thin_layer(module: nn.Module, base: nn.Linear, branch: Branch | None, adapted_bytes: int) -> Forward:
    weight = base.weight.detach()
    bias = None if base.bias is None else base.bias.detach()
    usual = module.forward
    # In half precision the sum would round away what a young adapter adds
    if branch is not None and adapted_bytes <= _MERGED_BYTES and weight.dtype == torch.float32:
        weight, branch = torch.addmm(weight, branch[1], branch[0], alpha=branch[2]), None
    thin = _thin_product(weight, bias, branch)
    merged = weight.data_ptr() != base.weight.data_ptr()

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != weight.dtype:
            return cast(torch.Tensor, usual(x))
        if x.numel() // x.shape[-1] > _THIN_ROWS:
            return linear(x, weight, bias) if merged else cast(torch.Tensor, usual(x))
        return thin(x)

    return forward


def _thin_product(weight: torch.Tensor, bias: torch.Tensor | None, branch: Branch | None = None) -> Forward:
    """`x W^T + b + s (x A^T) B^T` for few rows on a CPU."""
    outputs, inputs = weight.shape
    column_bias = None if bias is None else bias[:, None]
    lora_a, scaled_b = (None, None) if branch is None else (branch[0], branch[1] * branch[2])

    def product(x: torch.Tensor) -> torch.Tensor:
        count = x.numel() // inputs
        rows = x.reshape(count, inputs).contiguous()  # MKL is slow where the columns are not
        # A single column would be a matrix-vector product, which reads the weights at half the speed
        padded = 2 if count == 1 else count if count <= 8 else -(-count // 8) * 8
        columns = (rows if padded == count else pad(rows, (0, 0, 0, padded - count))).t()  # (in, n)
        out = torch.mm(weight, columns) if column_bias is None else torch.addmm(column_bias, weight, columns)
        if lora_a is not None and scaled_b is not None:
            out.addmm_(scaled_b, torch.mm(lora_a, columns))
        return out.t()[:count].contiguous().view(*x.shape[:-1], outputs)  # from (out, n)

    return product


def _settled_branch(module: LoraLayer, on_cpu: bool) -> Forward | None:
    """The layer with the adapter cast beforehand to the dtype that the base computes in; None where nothing is cast."""
    base, branch = module.base_layer, plain_branch(module)
    known = not isinstance(base, Linear8bitLt) and (type(base) is nn.Linear or base.compute_dtype is not None)
    if branch is None or not known or (on_cpu and type(base) is nn.Linear):
        return None
    dtype = compute_dtype(base, torch.float32)
    if branch[0].dtype == dtype:
        return None
    lora_a, lora_b, scaling = _in_dtype(branch, dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = base(x)
        return torch.add(out, (x.to(dtype) @ lora_a.t()) @ lora_b.t(), alpha=scaling).to(out.dtype)

    return forward


def _settled_dora(module: LoraLayer) -> Forward | None:
    """DoRA (arXiv:2402.09353, eq. 5) with `m / ||W + s B A||` taken beforehand; None for anything else.

    PEFT takes it at every call, for which it dequantizes a quantized weight once more.
    """
    name = plain_adapter(module)
    if name is None or type(module.lora_variant.get(name)) is not DoraLinearVariant or module.lora_bias[name]:
        return None
    dropout = cast(Any, module.lora_dropout[name])
    if module.training and not isinstance(dropout, nn.Identity) and dropout.p > 0:
        return None
    base, dora, scaling = module.base_layer, cast(Any, module.lora_magnitude_vector)[name], module.scaling[name]
    lora_a, lora_b = (cast(nn.Linear, pair[name]).weight.detach() for pair in (module.lora_A, module.lora_B))
    weight = dequantize_module_weight(base).detach().to(lora_a.dtype)
    scale = (dora.weight / dora.get_weight_norm(weight, lora_b @ lora_a, scaling)).detach()  # (out,)
    del weight

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = base(x)
        plain = out if base.bias is None else out - base.bias
        low = x.to(lora_a.dtype) @ lora_a.t()
        return (out + (scale - 1) * plain + (scale * scaling) * (low @ lora_b.t())).to(out.dtype)

    return forward


def _resident(layer: QuantizedLinear, on_cpu: bool) -> Forward:
    """A quantized layer that keeps its dequantized weight from its first call on."""
    bias = None if layer.bias is None else layer.bias.detach()
    products: dict[torch.dtype, tuple[Forward, Forward]] = {}  # for few rows, and for many

    def forward(x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(layer, x.dtype)
        if dtype not in products:
            weight = dequantized(layer, dtype)
            own_bias = None if bias is None else bias.to(dtype)
            many: Forward = partial(linear, weight=weight, bias=own_bias)
            products[dtype] = (_thin_product(weight, own_bias) if on_cpu else many, many)
        few = x.numel() // x.shape[-1] <= _THIN_ROWS
        with torch.autocast(x.device.type, enabled=False):
            return products[dtype][0 if few else 1](x.to(dtype)).to(x.dtype)

    return forward
