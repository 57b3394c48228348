"""From a loss per token to the loss of an optimizer step.

Every function returns a micro-batch's share: a sum over its tokens divided by a constant of the step. The shares of one
optimizer step add up to the step's loss, however its completions are dealt to the micro-batches, whereas a mean per
micro-batch would depend on the deal. With TRL's deal the sums are TRL's losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .choices import Choices


@dataclass(frozen=True, slots=True)
class StepNormalizer:
    """The sizes of one optimizer step on this process, by which its losses are divided.

    Args:
        num_sequences: Completions in the step.
        num_tokens: Tokens in the loss in the step.
        dapo_tokens: TRL's `num_items_in_batch` (the tokens in the loss of the whole generation batch, over all
            processes) per process and per accumulation window: `num_items_in_batch / num_processes *
            gradient_accumulation_steps / steps_per_generation`. It equals `num_tokens` on one process with one
            optimizer step per generation. A tensor `(B,)`, one value per completion, where the micro-batch holds
            completions of several generations.
        max_completion_length: The cap on a completion's length.
    """

    num_sequences: int | float
    num_tokens: float
    dapo_tokens: float | Tensor
    max_completion_length: int


def grpo(per_token_loss: Tensor, mask: Tensor, norm: StepNormalizer) -> Tensor:
    """Mean over each completion's tokens, mean over completions (GRPO, arXiv:2402.03300 eq. 3).

        sum_i (sum_t l_it m_it / max(|o_i|, 1)) / num_sequences

    A token of a long completion counts less than one of a short completion.
    """
    per_sequence = _masked(per_token_loss, mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
    return per_sequence.sum() / norm.num_sequences


def dr_grpo(per_token_loss: Tensor, mask: Tensor, norm: StepNormalizer) -> Tensor:
    """Sum over all tokens by a constant, free of length bias (Dr. GRPO, arXiv:2503.20783 §3.2).

    sum_it l_it m_it / (num_sequences * max_completion_length)
    """
    return _masked(per_token_loss, mask).sum() / (norm.num_sequences * norm.max_completion_length)


def bnpo(per_token_loss: Tensor, mask: Tensor, norm: StepNormalizer) -> Tensor:
    """Mean over all tokens of this process's optimizer step.

        sum_it l_it m_it / max(num_tokens, 1)

    TRL takes the mean over each micro-batch's own tokens and then over micro-batches, so that its result depends on
    which completions share a micro-batch. Ours does not: it is what TRL computes with one micro-batch per step.
    """
    return _masked(per_token_loss, mask).sum() / max(norm.num_tokens, 1.0)


def dapo(per_token_loss: Tensor, mask: Tensor, norm: StepNormalizer) -> Tensor:
    """Mean over all tokens of all processes (DAPO's token-level loss, arXiv:2503.14476 §3.3).

        sum_it l_it m_it / max(dapo_tokens, 1)

    The denominator is the processes' average, because DDP averages their gradients.
    """
    per_sequence = _masked(per_token_loss, mask).sum(dim=-1)
    return (per_sequence / torch.as_tensor(norm.dapo_tokens, device=mask.device).clamp(min=1)).sum()


AGGREGATIONS: Choices[Callable[[Tensor, Tensor, StepNormalizer], Tensor]] = Choices(
    "loss_type", {"grpo": grpo, "dr_grpo": dr_grpo, "bnpo": bnpo, "dapo": dapo}
)


def _masked(per_token_loss: Tensor, mask: Tensor) -> Tensor:
    """`(B, C)` with zeros off the mask; one value per completion, `(B, 1)`, is repeated over its tokens."""
    return torch.where(mask.bool(), per_token_loss, 0.0)
