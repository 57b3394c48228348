"""The scorers of reasoning-gym (github.com/open-thought/reasoning-gym) as a reward, for prompts that
`load_prompts("reasoning_gym:<task>")` made.

A row's column `reasoning_gym` says which entry it is: task, options, seed and index. The entry is made again where it
is scored, so that its scorer gets it as it was, whatever a data set's columns can hold.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trl_grpo_ext.rewards.extraction import after_thinking, last_answer_block
from trl_grpo_ext.rewards.text import completion_text

COLUMN = "reasoning_gym"


class ReasoningGymReward:
    """What the task's own scorer gives an answer, 0.0 to 1.0; None where a row has no entry.

    Args:
        whole: with True, a completion without `<answer>..</answer>` is its own answer, as a whole; by default it earns
            0.0.
    """

    __name__ = "reasoning_gym_reward"
    reward_is_row_wise = True

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole

    def __call__(
        self, completions: Sequence[Any], reasoning_gym: Sequence[str | None] | None = None, **columns: Any
    ) -> list[float | None]:
        """Rewards of `B` completions.

        Args:
            completions: `B` completions, each a string or a list of messages (the last assistant message is judged).
            reasoning_gym: the column of that name, `B` values.
            **columns: of which `problem` is compared with the entry that is made again; the rest is ignored.

        Returns:
            `B` rewards.

        Raises:
            ValueError: there is no such column, its length is not `B`, reasoning-gym is not installed, or this version
                of it makes another problem than the one the model was asked.
        """
        if reasoning_gym is None or len(reasoning_gym) != len(completions):
            raise ValueError(
                f"reasoning_gym_reward needs the column `{COLUMN}` with {len(completions)} values, got "
                f"{None if reasoning_gym is None else len(reasoning_gym)}: load the prompts with "
                "load_prompts('reasoning_gym:<task>')."
            )
        problems = columns.get("problem") or [None] * len(completions)
        return [
            None if where is None else self._score(completion_text(completion), where, problem)
            for completion, where, problem in zip(completions, reasoning_gym, problems, strict=True)
        ]

    def _score(self, text: str, where: str, problem: str | None) -> float:
        dataset, entry = _entry(where)
        if problem is not None and str(entry["question"]).strip() != problem.strip():
            raise ValueError(
                f"reasoning-gym makes another problem of {where} than the one in the data: {problem[:80]!r}. Load the "
                "prompts again, with the version that is installed now."
            )
        text = after_thinking(text)
        answer = last_answer_block(text)
        if answer is None and not self.whole:
            return 0.0
        return float(dataset.score_answer(text.strip() if answer is None else answer.strip(), entry))


@functools.lru_cache(maxsize=4096)
def _entry(where: str) -> tuple[Any, Mapping[str, Any]]:
    known = json.loads(where)
    dataset = _dataset(known["task"], known["rows"], known["seed"], json.dumps(known["options"]))
    return dataset, dataset[known["index"]]


@functools.lru_cache(maxsize=64)
def _dataset(task: str, rows: int, seed: int, options: str) -> Any:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(
            f"reasoning_gym_reward needs the package reasoning-gym ({error}): pip install 'trl-grpo-ext[reasoning-gym]'"
        ) from error
    return gym.create_dataset(task, size=rows, seed=seed, **json.loads(options))
