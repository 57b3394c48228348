"""Gradient checkpointing that recomputes only what would not fit anyway.

Checkpointing trades a second forward pass of every layer for memory. A packed row holds a fraction of the tokens of the
padded micro-batch it stands for, so part of the memory that checkpointing was to save is free already: layers keep
their activations as long as the row stays within a share of what the padded, fully checkpointed micro-batch would have
held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .logps import CompletionScorer
from .packing import GroupPart, pack_row

_PROBE_TOKENS = 64  # of each of the prompt and two completions, when a layer's activations are weighed


class RecomputeBudget:
    """Chooses, before every forward pass, how many layers are checkpointed.

    With `h` bytes of a layer's input and `a` bytes of all its activations per token (measured; `a'` before layers were
    fused), `L` layers, `N` packed and `M` padded tokens: checkpointing everything holds `M (L h + a')` for the padded
    micro-batch, since one layer is recomputed at a time. Keeping the activations of `k` layers of the packed row holds
    `N (L h + a + k (a - h))`, and `k` is the largest for which that is within `share` of the former.
    """

    def __init__(
        self, model: nn.Module, base_model: PreTrainedModel, scorer: CompletionScorer, share: float = 1.0
    ) -> None:
        self._layers = [module for module in base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._share = share
        config = base_model.config.get_text_config()
        self._input_bytes = float(config.hidden_size * base_model.dtype.itemsize)
        self._activation_bytes = self._unfused_bytes = self._weigh(model, base_model, scorer)

    def weigh_again(self, model: nn.Module, base_model: PreTrainedModel, scorer: CompletionScorer) -> None:
        """Layers were fused: packed rows run with what they keep now, padded ones ran with what they kept before."""
        self._activation_bytes = self._weigh(model, base_model, scorer)

    def _weigh(self, model: nn.Module, base_model: PreTrainedModel, scorer: CompletionScorer) -> float:
        """Bytes per token that a layer keeps for its backward."""
        if not self._layers:
            return 0.0
        owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        vocabulary = base_model.config.get_text_config().vocab_size
        tokens = [i % vocabulary for i in range(_PROBE_TOKENS)]
        row = pack_row([GroupPart(0, (0, 1))], [tokens], [tokens, tokens], base_model.device)
        training = [module for module in model.modules() if module.training]
        model.eval()  # checkpointing is off then, and dropout draws no random numbers
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                scorer.packed(model, row)
        finally:
            for module in training:
                module.training = True
        return sum(kept.values()) / row.layout.num_tokens / len(self._layers)

    def apply(self, packed_tokens: int, padded_tokens: int) -> int:
        """Set the layers' flags for a row; returns how many keep their activations."""
        count = len(self._layers)
        inputs = count * self._input_bytes
        budget = self._share * padded_tokens * (inputs + self._unfused_bytes)
        spare = budget - packed_tokens * (inputs + self._activation_bytes)
        extra = packed_tokens * max(self._activation_bytes - self._input_bytes, 1.0)
        keep = max(0, min(count, int(spare / extra))) if count else 0
        for i, layer in enumerate(self._layers):
            layer.gradient_checkpointing = i >= keep
        return keep


def is_default_checkpointing(args: Any) -> bool:
    """Whether checkpointing is on with nothing chosen by hand (which layers, offloading, reentrant)."""
    return bool(args.gradient_checkpointing) and not args.gradient_checkpointing_kwargs
