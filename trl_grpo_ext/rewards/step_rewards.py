"""Step rewards: for each completion, the rewards of its reasoning steps and where each step ends.

A step reward is called like any other reward function but returns one `StepRewards` (or None) per completion where an
outcome reward returns one number (or None). `is_step_reward` tells the two apart before anything is called.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trl_grpo_ext.rewards.arithmetic_claims import arithmetic_claims
from trl_grpo_ext.rewards.steps import Splitter, find_splitter
from trl_grpo_ext.rewards.text import completion_text

Reward = TypeVar("Reward", bound=Callable[..., Any])
# (prompts, steps of each completion, **columns) -> rewards of each completion's steps
Judge = Callable[..., Sequence[Sequence[float | None]]]


@dataclass(frozen=True, slots=True)
class StepRewards:
    """The S reasoning steps of one completion.

    Args:
        rewards: S values, None for a step that could not be judged: it is left out, which is not the same as 0.
        ends: S positions in the completion's text (as the reward function was given it), each after the step's last
            character.

    Raises:
        ValueError: the lists differ in length, or the ends do not increase.
    """

    rewards: list[float | None]
    ends: list[int]

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.ends):
            raise ValueError(
                f"a completion's step rewards hold {len(self.rewards)} rewards and {len(self.ends)} ends: each step "
                "needs both. Give None as the reward of a step that was not judged."
            )
        for before, after in itertools.pairwise([0, *self.ends]):
            if after <= before:
                raise ValueError(
                    f"a completion's steps end at characters {self.ends}: ends must increase, and the first be at "
                    "least 1. Leave out empty steps, and give each step once, in order."
                )


def step_reward(reward: Reward) -> Reward:
    """Say that a function returns `list[StepRewards | None]`, one per completion. For use as a decorator."""
    reward.reward_judges_steps = True  # type: ignore[attr-defined]
    return reward


def is_step_reward(reward: Any) -> bool:
    """Whether a reward judges steps: a `StepReward`, or a function marked by `step_reward`."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return bool(getattr(reward, "reward_judges_steps", False))


class StepReward(ABC):
    """A step reward made of a splitter, which finds the steps, and a judge, which is what a subclass is.

    Args:
        splitter: name in `SPLITTERS`, or a function from a text to the (start, end) of its steps.
    """

    reward_judges_steps = True

    def __init__(self, splitter: str | Splitter = "blank_lines") -> None:
        self.splitter = find_splitter(splitter)

    @abstractmethod
    def judge(
        self, prompts: Sequence[Any], steps: Sequence[Sequence[str]], **columns: Any
    ) -> Sequence[Sequence[float | None]]:
        """Rewards of each completion's steps, given as texts; None for a step that cannot be judged."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[StepRewards]:
        """One `StepRewards` per completion, standard or conversational.

        Raises:
            ValueError: `judge` returned another number of completions or steps than it was given.
        """
        texts = [completion_text(completion) for completion in completions]
        spans = [self.splitter(text) for text in texts]
        steps = [[text[start:end] for start, end in row] for text, row in zip(texts, spans, strict=True)]
        judged = self.judge(prompts, steps, **columns)
        given, returned = [len(row) for row in steps], [len(row) for row in judged]
        if given != returned:
            raise ValueError(
                f"{type(self).__name__}.judge returned {returned} rewards for completions of {given} steps: it must "
                "return a list per completion, with a number or None per step."
            )
        ends = [[end for _, end in row] for row in spans]
        return [StepRewards(list(rewards), row) for rewards, row in zip(judged, ends, strict=True)]


class JudgedSteps(StepReward):
    """A step reward from a function that judges steps: a remote process reward model, a symbolic checker, ...

    Args:
        judge: `judge(prompts, steps, **columns)`, where `steps` holds the texts of each completion's steps; returns a
            list per completion with a number or None per step. Defined at the top of a module it can run in a reward
            worker. Columns are the dataset's, and what else the trainer passes.
        splitter: as in `StepReward`.
    """

    def __init__(self, judge: Judge, splitter: str | Splitter = "blank_lines") -> None:
        super().__init__(splitter)
        self._judge = judge
        self.__name__ = getattr(judge, "__name__", type(judge).__name__)  # what the trainer logs it by

    def judge(
        self, prompts: Sequence[Any], steps: Sequence[Sequence[str]], **columns: Any
    ) -> Sequence[Sequence[float | None]]:
        """What the function says."""
        return self._judge(prompts, steps, **columns)


class ArithmeticSteps(StepReward):
    """A rule instead of a model: 1 for a step whose arithmetic claims (`48 / 2 = 24`) all hold, 0 if one is wrong.

    A step without a claim that can be checked gets None. What counts as a claim: `arithmetic_claims`.

    Args:
        splitter: as in `StepReward`.
    """

    reward_is_row_wise = True

    def judge(
        self, prompts: Sequence[Any], steps: Sequence[Sequence[str]], **columns: Any
    ) -> Sequence[Sequence[float | None]]:
        """1.0, 0.0 or None for each step."""
        return [[_all_hold(arithmetic_claims(step)) for step in row] for row in steps]


def _all_hold(claims: Sequence[bool]) -> float | None:
    return float(all(claims)) if claims else None
