"""What reward functions are called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_grpo_ext.rewards.outcome import short

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


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
