"""The LM head as log-probabilities see it: one weight and one bias, whatever is on it.

TRL's fused head multiplies hidden states by `lm_head.weight`, tile by tile, and never calls the module, so an adapter
on it would be passed over. But `h W^T + s (h A^T) B^T = [h, h A^T] [W, s B]^T`: with `h A^T` beside the hidden states
and `s B` beside the weight, the fused head computes adapter and all. It costs a copy of the weight, and while
gradients are taken one of its gradient in float32. A head in 4 bits is dequantized for the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..fused import is_lora_linear, plain_adapter
from ..quantized import compute_dtype, dequantized


@dataclass(frozen=True, slots=True)
class Head:
    """What `get_output_embeddings()` is taken for."""

    weight: torch.Tensor  # (V, H), or (V, H + r) with an adapter of rank r
    bias: torch.Tensor | None  # (V,)


def head_problem(model: PreTrainedModel) -> str | None:
    """Why log-probabilities under the LM head of `model` could not be computed from its weight; None if they can."""
    head: Any = _head(model)
    if isinstance(head, Linear8bitLt):
        return "a weight in 8 bits, with which rollouts would not compute what the update does"
    if not isinstance(head, BaseTunerLayer):
        return None
    layer: Any = head
    if not is_lora_linear(layer) or type(layer.base_layer) is not nn.Linear:
        return f"an adapter of type {type(head).__name__} on a {type(layer.get_base_layer()).__name__}"
    name = plain_adapter(layer)
    if name is None:
        return f"{len(layer.active_adapters)} active adapters"
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} (DoRA and the like)"
    if layer.lora_bias[name]:
        return "lora_bias=True"
    return None


def _head(model: PreTrainedModel) -> Any:
    # Of the class: the instance's may be `head_in_place`'s
    return type(model).get_output_embeddings(model)


def _adapted(model: PreTrainedModel) -> tuple[LoraLinear, str] | None:
    head = _head(model)
    if not isinstance(head, LoraLinear):
        return None
    names = head.active_adapters
    # Also where it is switched off, as for the reference: both passes' hidden states are then equally wide
    return (head, names[0]) if len(names) == 1 and names[0] in head.lora_A and not head.merged else None


def with_adapter(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """`(T, H)` hidden states as the head's weight wants them: `(T, H + r)` with an adapter, zeros where it is off."""
    found = _adapted(model)
    if found is None:
        return hidden
    layer, name = found
    weight = cast(nn.Linear, layer.lora_A[name]).weight
    if layer.disable_adapters:
        low = hidden.new_zeros(hidden.shape[0], weight.shape[0])
    else:
        low = layer.lora_dropout[name](hidden) @ weight.to(hidden.dtype).t()
    return torch.cat([hidden, low.to(hidden.dtype)], dim=-1)


def effective_head(model: PreTrainedModel) -> Head:
    """Weight and bias as they are now; differentiable."""
    found = _adapted(model)
    if found is None:
        layer = _head(model)
        quantized = isinstance(layer, Linear4bit)
        weight = dequantized(layer, compute_dtype(layer, torch.float32)) if quantized else layer.weight
        return Head(weight, getattr(layer, "bias", None))
    lora, name = found
    base = cast(nn.Linear, lora.base_layer)
    scaled = cast(nn.Linear, lora.lora_B[name]).weight * lora.scaling[name]
    return Head(torch.cat([base.weight, scaled.to(base.weight.dtype)], dim=1), base.bias)


@contextmanager
def head_in_place(model: PreTrainedModel) -> Iterator[None]:
    """Let `get_output_embeddings()` return the `effective_head`, for TRL's fused head."""
    # A wrapper is what PEFT makes of a head that is tied to an embedding with trainable tokens; it has no `bias`
    if _adapted(model) is None and not isinstance(_head(model), Linear4bit | AuxiliaryTrainingWrapper):
        yield
        return
    head = effective_head(model)
    vars(model)["get_output_embeddings"] = lambda: head
    try:
        yield
    finally:
        del vars(model)["get_output_embeddings"]
