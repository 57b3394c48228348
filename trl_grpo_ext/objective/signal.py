"""Which groups have a policy gradient at all."""

from __future__ import annotations

import torch
from torch import Tensor

from .advantages import as_groups, combine_rewards, has_spread


def groups_with_signal(
    rewards_per_func: Tensor, weights: Tensor, num_generations: int, *, separately: bool = False
) -> Tensor:
    """Whether a group's rewards differ, so that its advantages are not all 0.

    Args:
        rewards_per_func: `(B, K)` with B = P*G, NaN where there is no reward.
        weights: `(K,)`. A reward of weight 0 has no say.
        num_generations: G.
        separately: Each reward is normalised by itself (GDPO, `normalize_then_sum`), so that one that differs is
            taken for a signal, even if the weighted sums are equal. Rewards that mirror each other cancel all the same.

    Returns:
        `(P,)` bool.

    Raises:
        ValueError: If B is not a multiple of `num_generations`, or the shapes do not fit.
    """
    totals = combine_rewards(rewards_per_func, weights)[:, None]
    heard = rewards_per_func.masked_fill(weights == 0, torch.nan)
    judged = as_groups(heard if separately else totals, num_generations)  # (P, G, K or 1)
    return has_spread(judged, dim=1).any(dim=2)[:, 0]
