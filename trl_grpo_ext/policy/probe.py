"""Can this model's prompts be shared? Found out by trying, not by a list of names.

State-space layers, sliding windows, soft-capped attention, position schemes of their own: whether such a model can be
packed is decided by comparing the fast path with the padded one on a small random group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ..attention import UnsupportedAttention
from .layout import PackedLayout
from .logps import CompletionScorer
from .packing import GroupPart, pack_row

_PROMPTS = (5, 9)
_COMPLETIONS = (3, 6, 4, 1)
# Largest difference of a log-probability that still counts as rounding
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_16_BIT = 0.1


class _OneCallPerLayer:
    """A layout that refuses a layer's second attention call: rollouts keep keys and values by `layer_idx`."""

    def __init__(self, layout: PackedLayout) -> None:
        self._layout = layout
        self._called: set[int] = set()
        self.scored = layout.scored

    def attend(self, *states: torch.Tensor, layer_idx: int, **kwargs: Any) -> torch.Tensor:
        if layer_idx in self._called:
            raise UnsupportedAttention(f"attention is called more than once with layer_idx={layer_idx}")
        self._called.add(layer_idx)
        return self._layout.attend(*states, layer_idx=layer_idx, **kwargs)


def packing_problem(model: PreTrainedModel, scorer: CompletionScorer) -> str | None:
    """Why `model`'s completions cannot be scored in packed rows; None if they can."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size

    def tokens(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=generator).tolist()

    prompts = [tokens(n) for n in _PROMPTS]
    completions = [tokens(n) for n in _COMPLETIONS]
    parts = [GroupPart(0, (0, 1)), GroupPart(1, (2, 3))]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            padded = scorer.padded(
                model, [prompts[0]] * 2 + [prompts[1]] * 2, completions, pad_token_id=0, device=model.device
            )
            row = pack_row(parts, prompts, completions, model.device)
            watched = cast(PackedLayout, _OneCallPerLayer(row.layout))
            packed = scorer.packed(model, replace(row, layout=watched))
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return f"the packed forward pass fails with {type(error).__name__}: {error}"
    finally:
        for module in training:
            module.training = True
    difference = float((packed.logps - padded.logps).abs().max())
    if difference <= _TOLERANCE.get(model.dtype, _TOLERANCE_16_BIT):
        return None
    return f"packed and padded log-probabilities differ by {difference:.2g}"
