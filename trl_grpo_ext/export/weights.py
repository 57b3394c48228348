"""An adapter merged into the weights it was trained beside, each computed in float32 and rounded once.

PEFT adds in the base's dtype. For a linear layer with a float32 adapter that comes to the same thing; but its checked
merge (`safe_merge`), embeddings and `target_parameters` round the update first and the sum again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(slots=True)
class Rounding:
    """What rounding did to the update `D = W' - W` of all merged weights, `W'` being the merge in float32."""

    weights: int = 0  # tensors that the adapter changes
    entries: int = 0  # of `D` that are not 0
    lost: int = 0  # of those, how many left the weight bit-identical
    error_squares: float = 0.0  # ||round(W') - W'||^2
    update_squares: float = 0.0  # ||D||^2

    def add(self, before: torch.Tensor, merged: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count one tensor: in float32 before and after the merge, and as it is kept."""
        update = merged - before
        kept = rounded.to(torch.float32)
        moved = update != 0
        self.weights += bool(moved.any())
        self.entries += int(moved.sum())
        self.lost += int((moved & (kept == before)).sum())
        self.error_squares += float((kept - merged).square().sum(dtype=torch.float64))
        self.update_squares += float(update.square().sum(dtype=torch.float64))

    @property
    def lost_share(self) -> float:
        """Share of the update's entries that rounding undid; 0 without an update."""
        return self.lost / self.entries if self.entries else 0.0

    @property
    def relative_error(self) -> float:
        """`||round(W') - W'|| / ||D||`; 0 without an update."""
        return float((self.error_squares / self.update_squares) ** 0.5) if self.update_squares else 0.0


def parameter_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every parameter of a base model, by name: what the merged model keeps. Taken before the adapter."""
    return {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def merge_weights(
    model: PeftModel, dtypes: dict[str, torch.dtype], loaded: torch.dtype, kept: torch.dtype
) -> tuple[PreTrainedModel, Rounding]:
    """Merge the active adapter in place, layer by layer, and return the base model without PEFT around it.

    Args:
        model: Base and adapter.
        dtypes: `parameter_dtypes` of the base.
        loaded: Dtype the base was loaded in. Parameters in another one (kept in float32 by their model) stay in it.
        kept: Dtype of the merged model's weights.

    Tied embeddings of which only one has an adapter are untied, for the other must not move; `tie_word_embeddings` of
    the config then says so.

    Raises:
        ValueError: for an adapter that cannot be merged, or weights that `kept` cannot hold.
    """
    untie_adapted(model)
    rounding = Rounding()
    for base, tuners in _adapted(model):
        names = [name for name, p in base.named_parameters(recurse=False) if p.is_floating_point()]
        parameters = {name: cast(nn.Parameter, getattr(base, name)) for name in names}
        before = {name: parameter.data for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.data = parameter.data.to(torch.float32, copy=True)
        for tuner in tuners:
            _merge_layer(tuner)
        for name, parameter in parameters.items():
            target = kept if before[name].dtype == loaded else before[name].dtype
            merged = parameter.data
            parameter.data = merged.to(target)
            rounding.add(before[name].to(torch.float32), merged, parameter.data)
    base_model = cast(PreTrainedModel, model.get_base_model())
    configs = (base_model.config, base_model.config.get_text_config())
    tied_before = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that all layers are merged already, and that embeddings are untied: both meant
        merged_model = cast(PreTrainedModel, cast(Any, model.base_model).merge_and_unload())
    for name, parameter in merged_model.named_parameters(remove_duplicate=False):
        own = dtypes.get(name, loaded)
        parameter.data = parameter.data.to(kept if own == loaded else own)
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{name} has values that {str(kept).removeprefix('torch.')} cannot hold, or the adapter is damaged: "
                "merge in bfloat16 or float32"
            )
    _settle_tying(merged_model, tied_before)
    return merged_model, rounding


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, list[BaseTunerLayer]]]:
    """Every base layer with the adapter layers on it, the inner ones first (wrappers of parameters are nested)."""
    layers: dict[nn.Module, list[BaseTunerLayer]] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
            layers.setdefault(module.get_base_layer(), []).insert(0, module)
    yield from layers.items()


def _merge_layer(layer: BaseTunerLayer) -> None:
    try:
        layer.merge(safe_merge=True)
    except (NotImplementedError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the adapter cannot be merged: {type(layer).__module__.rpartition('.')[0]}.{type(layer).__name__}: {error}"
        ) from error


def untie_adapted(model: PeftModel) -> bool:
    """Give every adapted layer whose weight is another layer's too (tied embeddings) a weight of its own.

    Otherwise merging into the one would move the other. Returns whether there was one.
    """
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    untied = False
    for base, _ in _adapted(model):
        for name, parameter in list(base.named_parameters(recurse=False)):
            if owners[parameter] > 1:
                owners[parameter] -= 1
                setattr(base, name, nn.Parameter(parameter.data.clone(), requires_grad=False))
                untied = True
    return untied


def is_tied(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one tensor."""
    head, embeddings = _embedding_weights(model)
    return head is not None and head.data_ptr() == embeddings.data_ptr()


def _embedding_weights(model: PreTrainedModel) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The weights of LM head (None: the model has none) and input embeddings."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    return cast(torch.Tensor | None, head), cast(torch.Tensor, model.get_input_embeddings().weight)


def _settle_tying(model: PreTrainedModel, tied_before: list[PretrainedConfig]) -> None:
    """Embeddings that were tied and came out equal are tied again; the configs say so, or that they no longer are."""
    if not tied_before:
        return
    head, embeddings = _embedding_weights(model)
    if head is not None and torch.equal(head, embeddings):
        model.get_output_embeddings().weight = embeddings
    for config in tied_before:
        config.tie_word_embeddings = is_tied(model)
