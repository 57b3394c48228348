"""Gradient checkpointing that recomputes only what would not fit anyway.

Checkpointing trades a second forward pass of every layer for memory. A packed row holds a fraction of the tokens of the
padded micro-batch it stands for, so part of the memory that checkpointing was to save is free already: layers keep
their activations as long as the row stays within a share of what the padded, fully checkpointed micro-batch would have
held.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..evaluating import evaluating
from .logps import CompletionScorer
from .packing import GroupPart, pack_row

# What is weighed: rows of so many groups, each of a prompt and two completions of so many tokens
_PROBE_GROUPS = (4, 8)
_PROBE_TOKENS = 16


class RecomputeBudget:
    """Chooses, before every forward pass, how many layers are checkpointed.

    With `h` bytes of a layer's input and `a` bytes of all its activations per token (measured; `a'` before layers were
    fused), `w` bytes that a layer keeps whatever the tokens (under autocast, 16-bit casts of its weights), `L` layers,
    `N` packed and `M` padded tokens: checkpointing everything holds `M (L h + a')` for the padded micro-batch, since
    one layer is recomputed at a time. Keeping the activations of `k` layers of the packed row holds
    `N (L h + a + k (a - h)) + k w`, and `k` is the largest for which that is within `share` of the former. (The `w` of
    the layer that is being recomputed is in both, and left out.)

    Args:
        autocast: Makes the context that training runs its forward passes in.
    """

    def __init__(
        self,
        model: nn.Module,
        base_model: PreTrainedModel,
        scorer: CompletionScorer,
        share: float = 1.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._layers = [module for module in base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._share = share
        self._autocast = autocast
        config = base_model.config.get_text_config()
        self._input_bytes = float(config.hidden_size * base_model.dtype.itemsize)
        self._activation_bytes, self._weight_bytes = self._weigh(model, base_model, scorer)
        self._unfused_bytes = self._activation_bytes

    def weigh_again(self, model: nn.Module, base_model: PreTrainedModel, scorer: CompletionScorer) -> None:
        """Layers were fused: packed rows run with what they keep now, padded ones ran with what they kept before."""
        self._activation_bytes, self._weight_bytes = self._weigh(model, base_model, scorer)

    def _weigh(self, model: nn.Module, base_model: PreTrainedModel, scorer: CompletionScorer) -> tuple[float, float]:
        """Bytes that a layer keeps for its backward: per token, and whatever the tokens."""
        if not self._layers:
            return 0.0, 0.0
        (few, less), (many, more) = (self._kept(model, base_model, scorer, groups) for groups in _PROBE_GROUPS)
        per_token = (more - less) / (many - few)
        return per_token / len(self._layers), max(0.0, more - many * per_token) / len(self._layers)

    def _kept(
        self, model: nn.Module, base_model: PreTrainedModel, scorer: CompletionScorer, groups: int
    ) -> tuple[int, int]:
        """Tokens of a row of so many groups, and bytes that the whole model keeps of it."""
        owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice while this runs

        def pack(tensor: torch.Tensor) -> None:
            # Nothing is handed back: a node that holds its own output through a hook is a cycle that nobody frees
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage

        vocabulary = base_model.config.get_text_config().vocab_size
        tokens = [i % vocabulary for i in range(_PROBE_TOKENS)]
        parts = [GroupPart(g, (2 * g, 2 * g + 1)) for g in range(groups)]
        row = pack_row(parts, [tokens] * groups, [tokens] * 2 * groups, base_model.device)
        weighing = torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing)
        # In evaluation mode, where checkpointing is off and dropout draws no random numbers
        with evaluating(model), torch.enable_grad(), self._autocast(), weighing:
            scorer.packed(model, row)
        return row.layout.num_tokens, sum(storage.nbytes() for storage in kept.values())

    def apply(self, packed_tokens: int, padded_tokens: int) -> int:
        """Set the layers' flags for a row; returns how many keep their activations."""
        count = len(self._layers)
        inputs = count * self._input_bytes
        budget = self._share * padded_tokens * (inputs + self._unfused_bytes)
        spare = budget - packed_tokens * (inputs + self._activation_bytes)
        extra = packed_tokens * max(self._activation_bytes - self._input_bytes, 1.0) + self._weight_bytes
        keep = max(0, min(count, int(spare / extra))) if count else 0
        for i, layer in enumerate(self._layers):
            layer.gradient_checkpointing = i >= keep
        return keep


def is_default_checkpointing(args: Any) -> bool:
    """Whether checkpointing is on with nothing chosen by hand (which layers, offloading, reentrant)."""
    return bool(args.gradient_checkpointing) and not args.gradient_checkpointing_kwargs
