"""What is kept and said of completions that a reward failed on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_grpo_ext.rewards.batch import RewardBatch
from trl_grpo_ext.rewards.outcome import Problem

_KEPT_CHARS = 100_000  # of a prompt or a completion, in the file
_EXAMPLES = 3


class RewardError(RuntimeError):
    """A reward failed on more completions of a batch than `reward_max_failure_rate` allows."""


class FailureLog:
    """Appends failures to a file, and stops the run where there are too many.

    Args:
        path: A JSON Lines file with `step`, `reward`, `kind`, `message`, `prompt` and `completion`; None keeps nothing.
        max_rate: Share of a batch that a reward may fail on.
    """

    def __init__(self, path: Path | None, max_rate: float) -> None:
        self._path, self._max_rate = path, max_rate

    def report(self, name: str, problems: Mapping[int, Problem], batch: RewardBatch, *, may_stop: bool = True) -> None:
        """Write down the problems of one reward with one batch.

        Raises:
            RewardError: there are more than `max_rate` allows, and `may_stop`; shows three of them.
        """
        if not problems:
            return
        self._append(name, problems, batch)
        count = len(batch.completions)
        if not may_stop or len(problems) <= self._max_rate * count:
            return
        examples = [
            f"- completion {index} of {count}: {problem.message}\n{batch.shown(index)}"
            for index, problem in sorted(problems.items())[:_EXAMPLES]
        ]
        trace = next((problem.trace for problem in problems.values() if problem.trace), "")
        kept = f" All of them are in {self._path}." if self._path else ""
        raise RewardError(
            f"reward '{name}' failed on {len(problems)} of {count} completions at step {batch.step}, more than "
            f"reward_max_failure_rate={self._max_rate:g} allows.{kept} The first {len(examples)}:\n"
            + "\n".join(examples)
            + (f"\n{trace}" if trace else "")
        )

    def _append(self, name: str, problems: Mapping[int, Problem], batch: RewardBatch) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(
                {
                    "step": batch.step,
                    "reward": name,
                    "kind": problem.kind,
                    "message": problem.message,
                    "prompt": _kept(batch.prompts[index]),
                    "completion": _kept(batch.completions[index]),
                }
            )
            for index, problem in sorted(problems.items())
        ]
        with self._path.open("a", encoding="ascii") as file:  # JSON escapes the rest, unpaired surrogates too
            file.write("".join(f"{line}\n" for line in lines))


def _kept(value: Any) -> Any:
    """Messages as they are where they are small, text cut to what a file can bear."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    if len(text) > _KEPT_CHARS:
        return f"{text[:_KEPT_CHARS]}... ({len(text)} characters)"
    return value if isinstance(value, str) else json.loads(text)
