"""Rewards -> advantages: how much better a completion is than the others of its group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .choices import Choices


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages of a batch of completions and the spread they were measured against.

    Args:
        values: `(B,)`, or `(B, C)` where tokens differ (`process_advantages`). Exactly 0.0 for a completion without a
            reward and, with a baseline of the group, for a group whose rewards are all equal.
        std: `(B,)`. The standard deviation of the rewards that `scale` asks for: the group's for `"group"` and
            `"none"`, the batch's for `"batch"`, GDPO and `reinforce`. It is 0 where fewer than two rewards exist.
        zero_std: `(B,)`, bool. Where `std` is 0, which is what TRL's metric `frac_reward_zero_std` averages. With a
            batch-wide `std` it says nothing about a single group: to find groups without a gradient, test
            `values == 0`.
    """

    values: Tensor
    std: Tensor
    zero_std: Tensor


def combine_rewards(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each completion's rewards, leaving out the functions that returned None.

    Args:
        rewards_per_func: `(B, K)`, NaN where reward function k returned None.
        weights: `(K,)`.

    Returns:
        `(B,)`, NaN where every function returned None. A sum over nothing would be 0, which is a reward like any
        other: it would move the group's baseline and earn the completion an advantage it never was judged for.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if rewards_per_func.dim() != 2 or weights.shape != rewards_per_func.shape[1:]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} and rewards_per_func {tuple(rewards_per_func.shape)}: they must "
            "be (K,) and (B, K). Give one weight per reward function."
        )
    total = (rewards_per_func * weights.to(rewards_per_func)).nansum(dim=1)
    return total.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale: str = "group", correction: int = 1, eps: float = 1e-4
) -> Advantages:
    r"""Group-relative advantages, GRPO's replacement of a critic.

        A_i = (r_i - mean(r)) / (std(r) + eps)

    The mean is always the group's. The divisor is the group's standard deviation (`scale="group"`, arXiv:2402.03300
    §4.1.2), the batch's (`"batch"`, arXiv:2508.08221) or absent (`"none"`, Dr. GRPO, arXiv:2503.20783 §3.1). NaN
    rewards are outside mean and std and get advantage 0.

    The advantages of a group whose rewards are all equal are exactly 0.0. The formula alone does not give that: the
    mean of three 0.1 is not 0.1 in float32, and dividing the error by eps makes 1e-4 of it. With the exact zero such a
    group has no policy gradient at all, and may be skipped. This is the one difference from TRL's values.

    Args:
        rewards: `(B,)` with B = P*G, each group's completions side by side.
        num_generations: G. With 1 (which evaluation may use) every advantage is 0.
        scale: `"group"`, `"batch"` or `"none"`.
        correction: 1 for the sample standard deviation (TRL's), 0 for that of the population.
        eps: Added to the standard deviation, not to the variance (TRL's position).

    Raises:
        ValueError: If B is not a multiple of `num_generations`, or `scale` is unknown.
    """
    groups = as_groups(rewards, num_generations)  # (P, G)
    std, divisor = REWARD_SCALES[scale](groups, correction, eps)  # (P, G), (P, G) or 1
    values = (groups - groups.nanmean(dim=1, keepdim=True)) / divisor
    return _advantages(values, std, groups)


def normalize_then_sum_advantages(
    rewards_per_func: Tensor, weights: Tensor, num_generations: int, *, eps: float = 1e-4
) -> Advantages:
    """GDPO (arXiv:2601.05242): normalise each reward in its group, sum, then normalise over the batch.

        r'_ik = (r_ik - mean_group(r_k)) / (std_group(r_k) + eps)
        s_i   = sum_k w_k r'_ik
        A_i   = (s_i - mean_batch(s)) / (std_batch(s) + eps)

    A reward on a large scale cannot drown the others, as it can when rewards are summed first. All standard deviations
    are the sample's. Groups whose s are all equal get exactly 0.0, as in `group_advantages`; what this leaves out is
    rounding error only, because s sums to 0 in every group and so the batch's mean is 0 too.

    Args:
        rewards_per_func: `(B, K)`, B = P*G, each group's completions side by side, NaN where a function returned None.
        weights: `(K,)`.
        num_generations: G.
        eps: Added to each standard deviation.

    Raises:
        ValueError: If B is not a multiple of `num_generations` or the shapes do not fit.
    """
    grouped = as_groups(rewards_per_func, num_generations)  # (P, G, K)
    deviation = grouped - grouped.nanmean(dim=1, keepdim=True)
    normalised = deviation / (nanstd(grouped, dim=1, correction=1) + eps)
    # masked_fill and not a product: a missing reward must stay NaN, so that the sum can leave it out.
    normalised = normalised.masked_fill(~has_spread(grouped, dim=1) & ~grouped.isnan(), 0.0)

    total = combine_rewards(normalised.reshape(rewards_per_func.shape), weights)  # (B,)
    std = nanstd(total, dim=0, correction=1).expand_as(total)
    values = (total - total.nanmean()) / (std + eps)
    groups = as_groups(total, num_generations)
    return _advantages(values.view_as(groups), std.view_as(groups), groups)


def _advantages(values: Tensor, std: Tensor, groups: Tensor) -> Advantages:
    """Put in the exact zeros and flatten: all arguments (P, G)."""
    has_signal = has_spread(groups, dim=1) & ~groups.isnan()
    flat_std = std.flatten()
    return Advantages(
        values=torch.where(has_signal, values, 0.0).flatten(),
        std=flat_std,
        zero_std=torch.isclose(flat_std, torch.zeros_like(flat_std)),
    )


def as_groups(rewards: Tensor, num_generations: int) -> Tensor:
    """`(B, ...)` as `(P, G, ...)`; refuses a B that is not P*G."""
    if num_generations < 1 or rewards.shape[0] % num_generations != 0:
        raise ValueError(
            f"num_generations={num_generations} does not divide the {rewards.shape[0]} rewards: a batch must hold "
            "whole groups, num_generations completions of each prompt. Change the batch size or num_generations."
        )
    return rewards.reshape(-1, num_generations, *rewards.shape[1:])


def has_spread(values: Tensor, dim: int) -> Tensor:
    """Whether two values along `dim` differ, NaN aside; `dim` is kept."""
    missing = values.isnan()
    highest = values.masked_fill(missing, -torch.inf).amax(dim=dim, keepdim=True)
    lowest = values.masked_fill(missing, torch.inf).amin(dim=dim, keepdim=True)
    return highest > lowest


def nanstd(values: Tensor, dim: int, correction: int) -> Tensor:
    """Standard deviation along `dim`, NaN aside; `dim` is kept. Exactly 0 without spread, so also for one value."""
    scored = ~values.isnan()
    deviation = torch.where(scored, values - values.nanmean(dim=dim, keepdim=True), 0.0)
    count = scored.sum(dim=dim, keepdim=True)
    variance = deviation.square().sum(dim=dim, keepdim=True) / (count - correction).clamp(min=1)
    return torch.where(has_spread(values, dim), variance.sqrt(), 0.0)


# --- how the deviation from the group's mean is scaled: (groups (P, G), correction, eps) -> std (P, G) and divisor ---


def _scale_by_group(groups: Tensor, correction: int, eps: float) -> tuple[Tensor, Tensor | float]:
    std = nanstd(groups, dim=1, correction=correction).expand_as(groups)
    return std, std + eps


def _scale_by_batch(groups: Tensor, correction: int, eps: float) -> tuple[Tensor, Tensor | float]:
    std = nanstd(groups.flatten(), dim=0, correction=correction).expand_as(groups)
    return std, std + eps


def _no_scale(groups: Tensor, correction: int, eps: float) -> tuple[Tensor, Tensor | float]:
    # The std is still the group's: it is what the log reports.
    return nanstd(groups, dim=1, correction=correction).expand_as(groups), 1.0


REWARD_SCALES: Choices[Callable[[Tensor, int, float], tuple[Tensor, Tensor | float]]] = Choices(
    "scale_rewards", {"group": _scale_by_group, "batch": _scale_by_batch, "none": _no_scale}
)


# --- how several reward functions become one advantage ---


class Aggregator(Protocol):
    """`(rewards_per_func (B, K), weights (K,), num_generations, *, scale) -> Advantages`."""

    def __call__(self, rewards_per_func: Tensor, weights: Tensor, num_generations: int, *, scale: str) -> Advantages:
        """Advantages of the batch."""


def _sum_then_normalize(rewards_per_func: Tensor, weights: Tensor, num_generations: int, *, scale: str) -> Advantages:
    return group_advantages(combine_rewards(rewards_per_func, weights), num_generations, scale=scale)


def _normalize_then_sum(rewards_per_func: Tensor, weights: Tensor, num_generations: int, *, scale: str) -> Advantages:
    # GDPO fixes both normalisations, so `scale` has nothing to choose; TRL does not use scale_rewards here either.
    del scale
    return normalize_then_sum_advantages(rewards_per_func, weights, num_generations)


AGGREGATORS: Choices[Aggregator] = Choices(
    "multi_objective_aggregation",
    {"sum_then_normalize": _sum_then_normalize, "normalize_then_sum": _normalize_then_sum},
)
