"""Process supervision: the rewards of reasoning steps -> an advantage for every token (arXiv:2402.03300 §4.1.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .advantages import Advantages, as_groups, has_spread, nanstd


def stack_steps(
    rewards: Sequence[Sequence[float | None]], end_tokens: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Step rewards and where the steps end, as lists of any lengths, in two tensors.

    Args:
        rewards: B lists, the rewards of a completion's steps, None for a step that was not judged.
        end_tokens: B lists of the same lengths, the position of each step's last token in the completion, -1 for a step
            that ends before the first token.

    Returns:
        `(B, S)` float32, NaN for None and as filling, and `(B, S)` int64, -1 as filling; S is the largest number of
        steps.

    Raises:
        ValueError: If the lists differ in length.
    """
    lengths = [len(row) for row in rewards]
    if lengths != [len(row) for row in end_tokens]:
        raise ValueError(
            f"rewards holds {lengths} steps per completion and end_tokens {[len(row) for row in end_tokens]}: each "
            "step needs a reward (or None) and the position of its last token. Give both for every step."
        )
    shape = (len(lengths), max(lengths, default=0))
    step_rewards = torch.full(shape, torch.nan)
    step_ends = torch.full(shape, -1, dtype=torch.long)
    for b, length in enumerate(lengths):
        values = [torch.nan if reward is None else reward for reward in rewards[b]]
        step_rewards[b, :length] = torch.tensor(values, dtype=torch.float32)
        step_ends[b, :length] = torch.tensor(end_tokens[b], dtype=torch.long)
    return step_rewards, step_ends


def process_advantages(
    step_rewards: Tensor,
    step_ends: Tensor,
    num_generations: int,
    completion_length: int,
    *,
    correction: int = 1,
    eps: float = 1e-4,
) -> Advantages:
    r"""Advantages of tokens from the rewards of steps (DeepSeekMath, arXiv:2402.03300 §4.1.3).

        r~_j  = (r_j - mean(R)) / (std(R) + eps)          R: all steps of all completions of the group
        A_it  = sum_{j: end(j) >= t} r~_j                 j: steps of completion i

    A token answers for the step it is in and for all that follow. After the last step's end the advantage is 0. Steps
    without a reward (NaN) and steps that end before the first token (in what the prompt wrote) are outside mean, std
    and sums. A group whose step rewards are all equal gets exactly 0.0, as in `group_advantages`.

    The sum grows with the number of steps: a completion of many steps better than the mean has larger advantages than
    one of few. That is the paper's formula; it is not divided by anything here.

    Args:
        step_rewards: `(B, S)` with B = P*G, each group's completions side by side; NaN for no reward, and as filling.
        step_ends: `(B, S)` int64, position of the step's last token in the completion; -1 as filling.
        num_generations: G. Unlike with outcome rewards one completion with two steps is a group that has a signal.
        completion_length: C, tokens of the longest completion.
        correction: 1 for the sample standard deviation (as in `group_advantages`), 0 for that of the population.
        eps: Added to the standard deviation.

    Returns:
        `values` is `(B, C)`; `std` and `zero_std` are `(B,)`, of the steps of the completion's group.

    Raises:
        ValueError: If the shapes do not fit, B is not a multiple of `num_generations`, or a step ends after C tokens.
    """
    if step_rewards.dim() != 2 or step_ends.shape != step_rewards.shape:
        raise ValueError(
            f"step_rewards has shape {tuple(step_rewards.shape)} and step_ends {tuple(step_ends.shape)}: both must be "
            "(B, S). Make them with stack_steps."
        )
    if step_ends.numel() and int(step_ends.max()) >= completion_length:
        raise ValueError(
            f"step_ends holds {int(step_ends.max())}, but completions have {completion_length} tokens at most: it must "
            "hold positions of tokens in the completion. Map the steps on the tokens that were sampled."
        )
    batch, steps = step_rewards.shape
    if steps == 0:  # nothing to take a maximum over
        step_rewards, step_ends = step_rewards.new_full((batch, 1), torch.nan), step_ends.new_full((batch, 1), -1)
    judged = step_rewards.masked_fill(step_ends < 0, torch.nan)
    pooled = as_groups(judged, num_generations).flatten(start_dim=1)  # (P, G*S)

    std = nanstd(pooled, dim=1, correction=correction)  # (P, 1)
    normalised = (pooled - pooled.nanmean(dim=1, keepdim=True)) / (std + eps)
    normalised = torch.where(has_spread(pooled, dim=1) & ~pooled.isnan(), normalised, 0.0).view_as(judged)  # (B, S)

    at_end = normalised.new_zeros(batch, completion_length)
    if completion_length:  # a step that ends before the first token adds its 0 to it
        at_end.scatter_add_(1, step_ends.clamp(min=0), normalised)
    std_of_each = std.expand(-1, num_generations).flatten()
    return Advantages(
        values=at_end.flip(1).cumsum(dim=1).flip(1),  # of token t: all that ends at t or after it
        std=std_of_each,
        zero_std=torch.isclose(std_of_each, torch.zeros_like(std_of_each)),
    )


def mix_advantages(
    outcome: Tensor, process: Tensor, lengths: Tensor, *, outcome_weight: float = 1.0, process_weight: float = 1.0
) -> Tensor:
    """Outcome and process supervision together: `A_it = outcome_weight * A_i + process_weight * A'_it`.

    Args:
        outcome: `(B,)` advantages of whole completions.
        process: `(B, C)` advantages of tokens.
        lengths: `(B,)` tokens of each completion.
        outcome_weight, process_weight: How much each counts.

    Returns:
        `(B, C)`, 0 past a completion's end.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if process.dim() != 2 or outcome.shape != process.shape[:1] or lengths.shape != process.shape[:1]:
        raise ValueError(
            f"outcome has shape {tuple(outcome.shape)}, lengths {tuple(lengths.shape)} and process "
            f"{tuple(process.shape)}: they must be (B,), (B,) and (B, C). Give one of each per completion."
        )
    inside = torch.arange(process.shape[1], device=process.device) < lengths.to(process.device)[:, None]
    mixed = outcome_weight * outcome.to(process)[:, None] + process_weight * process
    return torch.where(inside, mixed, 0.0)
