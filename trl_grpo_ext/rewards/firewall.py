"""Between other people's reward functions and the training loop: what goes in, what may come out, whom to blame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_SHOWN_CHARS = 2_000
_FLOAT32_MAX = torch.finfo(torch.float32).max
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is not a finite number or None."""


@dataclass(frozen=True)
class RewardBatch:
    """What a reward function is called with, B values each, and the step it is called in.

    Raises:
        ValueError: lengths differ, or a dataset column has the name of one of the arguments.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    step: int
    prefills: list[str]  # what a prompt wrote of the completion already: the completion's text begins with it

    def __post_init__(self) -> None:
        taken = [name for name in self.columns if name in RESERVED]
        if taken:
            raise ValueError(f"the dataset column(s) {taken} have names of reward arguments {RESERVED}: rename them.")
        for name, values in {**self.kwargs(), "prefills": self.prefills}.items():
            if len(values) != len(self.prompts):
                raise ValueError(
                    f"`{name}` has {len(values)} values for {len(self.prompts)} prompts: rewards need one for each."
                )

    def kwargs(self) -> dict[str, list[Any]]:
        """The arguments that hold one value per completion."""
        return {
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
            **self.columns,
        }

    def row(self, index: int) -> RewardBatch:
        """A batch of this completion alone."""
        columns = {name: [values[index]] for name, values in self.columns.items()}
        ids = [self.completion_ids[index]]
        prefill = [self.prefills[index]]
        return RewardBatch([self.prompts[index]], [self.completions[index]], ids, columns, self.step, prefill)

    def shown(self, index: int) -> str:
        """A completion and its prompt, for a message."""
        return f"prompt: {short(self.prompts[index])}\ncompletion: {short(self.completions[index])}"


def blame(name: str, batch: RewardBatch, error: BaseException, call: Callable[[RewardBatch], Any]) -> RewardError:
    """The error to raise for a reward that raised on a batch.

    `call` is tried on one completion after the other, so that the message can show the first one it raises on; if it
    raises on none of them alone, the message says so and shows the first of the batch.
    """
    head = f"reward '{name}' raised {type(error).__name__} at step {batch.step}: {error}"
    count = len(batch.completions)
    for index in range(count):
        try:
            call(batch.row(index))
        except Exception as alone:
            same = type(alone) is type(error) and str(alone) == str(error)
            note = "" if same else f", called on it alone, with {type(alone).__name__}: {alone}"
            return RewardError(f"{head}\nIt raises on completion {index} of {count}{note}.\n{batch.shown(index)}")
    return RewardError(
        f"{head}\nIt raises on the batch of {count} completions, but on none of them alone; the first one is shown.\n"
        f"{batch.shown(0)}"
    )


def checked(name: str, output: Any, batch: RewardBatch) -> list[float]:
    """B floats from what a reward returned, NaN for None.

    Raises:
        ValueError: it is not a list of B values.
        RewardError: a value is neither a finite number (in float32) nor None.
    """
    expected = len(batch.completions)
    rule = f"expected {expected} values: one number or None per completion."
    if not isinstance(output, Iterable) or isinstance(output, (str, bytes, Mapping)):
        what = f"{short(output)} ({type(output).__name__})"
        raise ValueError(f"reward '{name}' returned {what} at step {batch.step}, {rule}")
    values = list(output)
    if len(values) != expected:
        raise ValueError(f"reward '{name}' returned {len(values)} values at step {batch.step}, {rule}")
    return [_checked_value(name, value, index, batch) for index, value in enumerate(values)]


def short(value: Any) -> str:
    """`repr`, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"


def _checked_value(name: str, value: Any, index: int, batch: RewardBatch) -> float:
    if value is None:
        return math.nan
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value  # NumPy, torch
    # The comparison is False for NaN, for infinities, and for what float32 would round to one.
    if isinstance(plain, (int, float)) and abs(plain) <= _FLOAT32_MAX:
        return float(plain)
    raise RewardError(
        f"reward '{name}' returned {short(value)} ({type(value).__name__}) for completion {index} of "
        f"{len(batch.completions)} at step {batch.step}: it must be a finite number, or None to leave the completion "
        f"out.\n{batch.shown(index)}"
    )
