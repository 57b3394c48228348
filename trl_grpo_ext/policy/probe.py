"""Can this model's prompts be shared? Found out by trying, not by a list of model names.

State-space layers, soft-capped attention, position schemes of their own: whether such a model can be packed is decided
by comparing the fast path with the padded one on a small random group. What begins at some length only (windows,
chunks, sparse attention) is read from the config: see `local_attention`. Rounding is told from mistakes by how far the
padded path is from itself when its rows are computed one at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ..attention import UnsupportedAttention, local_attention
from ..evaluating import evaluating
from .layout import PackedLayout
from .logps import CompletionScorer
from .packing import GroupPart, pack_row

_PROMPTS = (5, 9)
_COMPLETIONS = (3, 6, 4, 1)
# A difference of log-probabilities up to this counts as rounding, however little the padded path rounds ...
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_16_BIT = 0.1
# ... and so does one of up to so many times that path's own: in 16 bits the logits of a large model are coarse
_TIMES_ITS_OWN = 4.0


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
    """Why `model`'s completions cannot be scored in packed rows; None if they can.

    Raises:
        torch.OutOfMemoryError: if there is no room for the trial itself, which is no answer.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size

    def tokens(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=generator).tolist()

    prompts = [tokens(n) for n in _PROMPTS]
    completions = [tokens(n) for n in _COMPLETIONS]
    parts = [GroupPart(0, (0, 1)), GroupPart(1, (2, 3))]
    prompt_of = [prompts[part.prompt] for part in parts for _ in part.completions]

    def padded(some: slice) -> torch.Tensor:
        return scorer.padded(model, prompt_of[some], completions[some], pad_token_id=0, device=model.device).logps

    try:
        with torch.no_grad(), evaluating(model):
            together = padded(slice(None))
            alone = [padded(slice(i, i + 1))[0] for i in range(len(completions))]
            row = pack_row(parts, prompts, completions, model.device)
            watched = cast(PackedLayout, _OneCallPerLayer(row.layout))
            packed = scorer.packed(model, replace(row, layout=watched)).logps
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return f"the packed forward pass fails with {type(error).__name__}: {error}"
    rounding = max(float((logps - together[i, : len(logps)]).abs().max()) for i, logps in enumerate(alone))
    difference = float((packed - together).abs().max())
    if difference <= max(_tolerance(model), _TIMES_ITS_OWN * rounding):
        return local_attention(model)
    return f"packed and padded log-probabilities differ by {difference:.2g}"


def _tolerance(model: PreTrainedModel) -> float:
    """By the precision that layers compute in, of which a quantized model's other parameters tell nothing."""
    if getattr(model, "quantization_method", None) is not None:
        return _TOLERANCE_16_BIT
    return _TOLERANCE.get(model.dtype, _TOLERANCE_16_BIT)
