"""The one attention function of the package.

A transformers model has a single attention implementation, and both the rollouts and the update need one that knows
about groups. This module registers it: called with the keyword `group_layout`, it hands queries, keys and values to the
layout's own `attend`; called without, it is plain SDPA, so `model.generate` and everybody else are untouched. Models
pass keywords they do not know down to their attention layers, which is how the layout of a micro-batch (or of a decode
step) travels.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUP_ATTENTION = "grpo_group_sdpa"
# Keywords by which a layer asks for an attention that differs from softmax(QK^T)V; `group_attention` refuses them
_SPECIAL_KEYWORDS = ("softcap", "sliding_window", "s_aux", "position_bias")
# Config fields whose pattern a model may write into its mask alone, which layouts never look at. Where the config
# lists its layers' types, those say whether a window is in effect.
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")
_SPARSE_FIELDS = ("index_topk", "keep_window_size")


class GroupLayout(Protocol):
    """Which tokens of a packed row see which: what `group_layout=` carries."""

    def attend(
        self,
        query: torch.Tensor,  # (1, heads, N, D)
        key: torch.Tensor,  # (1, kv_heads, N, D), or what the cache's `update` returned
        value: torch.Tensor,
        *,
        layer_idx: int,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:  # (1, N, heads, D)
        """Attention output of every query token, in the order of the row."""
        ...


class UnsupportedAttention(ValueError):
    """A layer asks for an attention that group layouts do not compute (soft-capping, sliding windows, sinks, ...)."""


def group_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    group_layout: GroupLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function with the signature of `transformers.AttentionInterface`.

    Raises:
        UnsupportedAttention: with a `group_layout`, if the layer asks for soft-capping, a sliding window, attention
            sinks or a position bias.
    """
    if group_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for keyword in _SPECIAL_KEYWORDS:
        if kwargs.get(keyword) is not None:
            raise UnsupportedAttention(f"{type(module).__name__} uses {keyword}={kwargs[keyword]!r}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx = cast(int, getattr(module, "layer_idx", 0))
    return group_layout.attend(query, key, value, layer_idx=layer_idx, scaling=scale, dropout=dropout), None


def local_attention(model: PreTrainedModel) -> str | None:
    """What in `model`'s config keeps a token from seeing all that came before it; None if nothing does.

    Windows, chunks and sparse attention begin to matter at some length, often thousands of tokens, and some models
    (Llama 4, Qwen2-MoE, Phi-3.5-MoE) have them in the mask alone. So a short trial cannot find them.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    other = sorted(set(layer_types or ()) - {"full_attention"})
    if other:
        return f"its config's layer_types are {', '.join(other)}, not only full_attention"
    fields = _SPARSE_FIELDS if layer_types else (*_WINDOW_FIELDS, *_SPARSE_FIELDS)
    for field in fields:
        value = getattr(config, field, None)
        if value:
            return f"its config has {field}={value!r}"
    return None


def use_group_attention(model: PreTrainedModel) -> bool:
    """Switch `model` from SDPA to `group_attention`; True if it now uses it.

    Only models on SDPA are switched (the numbers of a model that somebody put on eager or flash attention on purpose
    stay as they are).
    """
    implementation = model.config._attn_implementation
    if implementation == GROUP_ATTENTION:
        return True
    if implementation != "sdpa":
        return False
    model.set_attn_implementation(GROUP_ATTENTION)
    return bool(model.config._attn_implementation == GROUP_ATTENTION)


def dummy_mask(device: torch.device) -> torch.Tensor:
    """A 4-D mask that keeps a model from building an `(N, N)` one for a packed row; layouts never look at it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionInterface.register(GROUP_ATTENTION, group_attention)
AttentionMaskInterface.register(GROUP_ATTENTION, sdpa_mask)
