"""What a rollout leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rollouts:
    """`G` completions for each of `P` prompts; completion `b = p * G + g` belongs to prompt `p`."""

    prompt_ids: list[list[int]]  # P prompts
    completion_ids: list[list[int]]  # B = P * G completions, each with the EOS that ended it, if one did
    logps: torch.Tensor  # (B, C) float32 on the CPU: log-probabilities of the drawn tokens, 0 past the end
    finish_reasons: list[str]  # (B,) "eos", or "length" where max_new_tokens cut the completion off
    num_generations: int  # G

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.completion_ids]
