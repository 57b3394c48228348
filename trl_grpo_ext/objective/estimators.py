"""What a completion's reward is compared with: other ways to a baseline, beside the group-relative one of GRPO.

All of them take NaN for a completion without a reward: it moves nobody's baseline and gets advantage 0. Groups of
unequal size (some prompts drew more completions than others) are filled up with NaN.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .advantages import Advantages, as_groups, group_advantages, has_spread, nanstd
from .choices import Choices


def rloo_advantages(rewards: Tensor, num_generations: int) -> Advantages:
    r"""Leave-one-out baseline: the mean of the *other* completions of the group (RLOO, arXiv:2402.14740 §2).

        A_i = r_i - (1 / (n - 1)) sum_{j != i} r_j = n / (n - 1) (r_i - mean(r))

    n counts the group's rewards that are not NaN. The baseline of a completion does not depend on its own reward, so
    it is unbiased; it differs from the centred-only group advantage (`scale="none"`) by the factor n / (n - 1).

    Args:
        rewards: `(B,)` with B = P*G, each group's completions side by side.
        num_generations: G.

    Returns:
        Advantages, exactly 0 in a group without spread and where n < 2; `std` is the group's, sample.

    Raises:
        ValueError: If B is not a multiple of `num_generations`.
    """
    groups = as_groups(rewards, num_generations)  # (P, G)
    count = groups.isfinite().sum(dim=1, keepdim=True)  # (P, 1)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    return _advantages(centred * count / (count - 1).clamp(min=1), groups, has_spread(groups, dim=1))


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor, num_generations: int) -> Advantages:
    """The reward of the policy's greedy completion of the same prompt as the baseline (ReMax, arXiv:2310.10505 §4).

        A_i = r_i - r_greedy(prompt of i)

    It costs one more completion per prompt, and it has a signal with a single sampled completion (G = 1) and in groups
    that are all right or all wrong, as long as the greedy completion is not.

    Args:
        rewards: `(B,)` with B = P*G, each group's completions side by side.
        greedy_rewards: `(P,)`, one per group, NaN where there is none; then the group has no baseline and gets 0.
        num_generations: G.

    Returns:
        Advantages, exactly 0 where a reward equals its baseline; `std` is the group's, sample.

    Raises:
        ValueError: If B is not a multiple of `num_generations`, or `greedy_rewards` is not `(P,)`.
    """
    groups = as_groups(rewards, num_generations)  # (P, G)
    if greedy_rewards.shape != groups.shape[:1]:
        raise ValueError(
            f"greedy_rewards has shape {tuple(greedy_rewards.shape)}: it must be ({len(groups)},), the reward of one "
            f"greedy completion for each of the {len(groups)} prompts. Generate and score one per prompt."
        )
    baseline = greedy_rewards.to(groups)[:, None]  # (P, 1)
    # No spread is needed here: the difference of two equal rewards is exactly 0 by itself.
    return _advantages(groups - baseline, groups, ~baseline.isnan())


def raft_advantages(rewards: Tensor, num_generations: int) -> Advantages:
    """Rejection-sampling fine-tuning: learn from the best of the group only (RAFT, arXiv:2304.06767 §3.1).

        A_i = 1 if i is the group's best, else 0

    With it the policy-gradient loss at ratio 1 is supervised fine-tuning on the best completions. Of several with the
    highest reward the first one is taken: completions of a group are independent draws, so that this is a fair draw
    among the tied, and every group counts once, however many of its completions are right. A group whose rewards are
    all equal has no best one.

    Args:
        rewards: `(B,)` with B = P*G, each group's completions side by side.
        num_generations: G.

    Returns:
        Advantages, each exactly 1 or 0; `std` is the group's, sample.

    Raises:
        ValueError: If B is not a multiple of `num_generations`.
    """
    groups = as_groups(rewards, num_generations)  # (P, G)
    candidates = groups.masked_fill(groups.isnan(), -torch.inf)
    # argmax does not promise the first of equal values; cumsum == 1 picks it
    tied = candidates == candidates.amax(dim=1, keepdim=True)
    best = tied & (tied.cumsum(dim=1) == 1)
    return _advantages(best.to(groups.dtype), groups, has_spread(groups, dim=1))


def reinforce_advantages(rewards: Tensor, num_generations: int) -> Advantages:
    """REINFORCE with the batch's mean reward as the baseline (Williams 1992; arXiv:2402.14740 §2 for language models).

        A_i = r_i - mean_batch(r)

    An easy prompt's completions all gain, a hard one's all lose: unlike the group's mean, the batch's says nothing
    about the prompt. It has a signal with one completion per prompt (G = 1).

    Args:
        rewards: `(B,)` with B = P*G.
        num_generations: G; only checked, so that all estimators refuse the same batches.

    Returns:
        Advantages, exactly 0 where all rewards of the batch are equal; `std` is the batch's, sample.

    Raises:
        ValueError: If B is not a multiple of `num_generations`.
    """
    groups = as_groups(rewards, num_generations)  # (P, G)
    batch = groups.reshape(1, -1)  # (1, B)
    return _advantages(batch - batch.nanmean(), batch, has_spread(batch, dim=1))


def _advantages(values: Tensor, groups: Tensor, has_signal: Tensor) -> Advantages:
    """Put in the exact zeros and flatten: `values` and `groups` are (P, G), `has_signal` broadcasts to them."""
    std = nanstd(groups, dim=1, correction=1).expand_as(groups).flatten()
    kept = has_signal & ~groups.isnan()
    return Advantages(
        values=torch.where(kept, values, 0.0).flatten(), std=std, zero_std=torch.isclose(std, torch.zeros_like(std))
    )


# --- the table ---


class AdvantageEstimator(Protocol):
    """`(rewards (B,), num_generations, *, scale, greedy_rewards (P,) or None) -> Advantages`."""

    def __call__(
        self, rewards: Tensor, num_generations: int, *, scale: str = "group", greedy_rewards: Tensor | None = None
    ) -> Advantages:
        """Advantages of the batch. `scale` is for `group` only, `greedy_rewards` for `remax` only."""


def _group(
    rewards: Tensor, num_generations: int, *, scale: str = "group", greedy_rewards: Tensor | None = None
) -> Advantages:
    del greedy_rewards
    return group_advantages(rewards, num_generations, scale=scale)


def _rloo(
    rewards: Tensor, num_generations: int, *, scale: str = "group", greedy_rewards: Tensor | None = None
) -> Advantages:
    del scale, greedy_rewards
    return rloo_advantages(rewards, num_generations)


def _remax(
    rewards: Tensor, num_generations: int, *, scale: str = "group", greedy_rewards: Tensor | None = None
) -> Advantages:
    del scale
    if greedy_rewards is None:
        raise ValueError(
            "advantage_estimator='remax' needs greedy_rewards, the reward of one greedy completion per prompt: "
            "generate and score one, or choose an estimator without this baseline."
        )
    return remax_advantages(rewards, greedy_rewards, num_generations)


def _raft(
    rewards: Tensor, num_generations: int, *, scale: str = "group", greedy_rewards: Tensor | None = None
) -> Advantages:
    del scale, greedy_rewards
    return raft_advantages(rewards, num_generations)


def _reinforce(
    rewards: Tensor, num_generations: int, *, scale: str = "group", greedy_rewards: Tensor | None = None
) -> Advantages:
    del scale, greedy_rewards
    return reinforce_advantages(rewards, num_generations)


ADVANTAGE_ESTIMATORS: Choices[AdvantageEstimator] = Choices(
    "advantage_estimator",
    {"group": _group, "rloo": _rloo, "remax": _remax, "raft": _raft, "reinforce": _reinforce},
)
