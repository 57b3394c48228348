"""One completion of an evaluation, and what was found of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Judged:
    """A completion, and the judgements on it."""

    policy: str  # "base" or "adapter"
    prompt_index: int  # row of the dataset
    completion_index: int  # g: base and adapter drew it with the same noise
    completion: str
    tokens: int
    finish_reason: str  # "eos" or "length"
    logp: float  # sum of its tokens' log-probabilities under the policy that drew it
    reward: float | None  # None: the reward failed on it, or had nothing to say
    format_reward: float | None  # None: likewise, or there is no format reward
    answer: str | None = None  # extracted
    vote: int | None = None  # the same number for the same answer of this prompt

    @property
    def right(self) -> bool | None:
        """Whether the reward is 1; None without one."""
        return None if self.reward is None else self.reward == 1.0
