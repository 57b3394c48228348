"""The clipped surrogate, and which tokens it clipped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """The loss per token: PPO's pessimistic bound (arXiv:1707.06347 §3), negated.

        -min(min(ratio, delta) A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)

    Different epsilons are DAPO's clip-higher (arXiv:2503.14476 §3.1). `delta` is the second side of two-sided clipping
    (INTELLECT-2, arXiv:2505.07291): without it the loss of a negative advantage grows without bound as the ratio does.
    It belongs above 1 + epsilon_high, where the first clip does not reach; lower, it also takes the gradient from
    positive advantages whose ratio is above it.

    Args:
        ratio: `(B, C)` or, at sequence level, `(B, 1)`.
        advantages: `(B,)`, or `(B, C)` for an advantage per token.
        epsilon_low: Room below 1.
        epsilon_high: Room above 1.
        delta: Upper bound of the unclipped ratio, or None.

    Returns:
        `(B, C)`; `(B, 1)` if both inputs have one value per completion.
    """
    per_token = _per_token(advantages)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.min(_bounded(ratio, delta) * per_token, clipped * per_token)


class ClipIndicators(NamedTuple):
    """Where the clip took the gradient away: bool tensors of the ratio's shape broadcast with the advantages'."""

    low: Tensor
    high: Tensor
    region: Tensor


def clip_indicators(
    ratio: Tensor, advantages: Tensor, *, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> ClipIndicators:
    """What TRL's metrics `clip_ratio/low|high|region` are means of.

    low: ratio < 1 - epsilon_low and A < 0; high: ratio > 1 + epsilon_high and A > 0; region: either. A ratio exactly on
    a bound is not clipped. TRL looks at the ratio after `delta` has bounded it, and so do we: with a `delta` below
    1 + epsilon_high nothing counts as clipped high.

    Args:
        ratio: `(B, C)` or `(B, 1)`.
        advantages: `(B,)` or `(B, C)`.
        epsilon_low: Room below 1.
        epsilon_high: Room above 1.
        delta: As in `clipped_surrogate`.
    """
    per_token = _per_token(advantages)
    bounded = _bounded(ratio, delta)
    low = (bounded < 1 - epsilon_low) & (per_token < 0)
    high = (bounded > 1 + epsilon_high) & (per_token > 0)
    return ClipIndicators(low=low, high=high, region=low | high)


def _per_token(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def _bounded(ratio: Tensor, delta: float | None) -> Tensor:
    return ratio if delta is None else ratio.clamp(max=delta)
