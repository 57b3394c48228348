"""Tasks of reasoning-gym (github.com/open-thought/reasoning-gym), an optional package: `reasoning_gym:<task>`.

Its scorers judge an answer by the entry that it was made for. Which one that is, the column `reasoning_gym` says: see
`trl_grpo_ext.rewards.reasoning_gym`.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from .code import CODE

DEFAULT_ROWS = 10_000
# The held-out split is drawn from other seeds, and what it shares with the training split's entries is not known:
# reasoning-gym has no splits. Load it with decontaminate=("reasoning_gym:<task>",) to be sure.
_TEST_SEED = 1_000_003


def reasoning_gym_rows(
    source: str, task: str, split: str, options: dict[str, str], seed: int, streaming: bool
) -> Dataset | IterableDataset:
    """Entries of a task: `rows` of them (by default 10,000); other options are those of the task's own config.

    Raises:
        ValueError: the package is not there, or has no such task, split or option.
    """
    gym = _package(source)
    known = sorted(gym.factory.DATASETS)
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"source={source!r}: reasoning-gym has no task {task!r}{hint}; it has {', '.join(known)}.")
    if split not in ("train", "test"):
        raise ValueError(f"source={source!r} has no split {split!r}; it has train, test.")
    rows = options.get("rows", str(DEFAULT_ROWS))
    if not rows.isdigit() or not int(rows):
        raise ValueError(f"config of source={source!r}: rows={rows!r} must be a whole number of at least 1.")
    own = {key: _literal(value) for key, value in options.items() if key != "rows"}
    drawn = seed + (_TEST_SEED if split == "test" else 0)
    try:
        first = [gym.create_dataset(task, size=int(rows), seed=drawn, **own)[0]["question"] for _ in range(2)]
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"config of source={source!r}: reasoning-gym refuses {own}: {error}") from error
    if first[0] != first[1]:
        raise ValueError(
            f"source={source!r}: under one seed reasoning-gym makes other problems of this task each time, so "
            "that a reward cannot know what was asked. Choose another task."
        )
    arguments = {"task": task, "rows": int(rows), "seed": drawn, "options": own, "version": _version(gym), "code": CODE}
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(generate, gen_kwargs=arguments)


def generate(
    task: str, rows: int, seed: int, options: dict[str, Any], version: str, code: str
) -> Iterator[dict[str, Any]]:
    """The rows of a task. `version` and `code` are there for the cache."""
    entries = importlib.import_module("reasoning_gym").create_dataset(task, size=rows, seed=seed, **options)
    for index in range(rows):
        entry = entries[index]
        where = {"task": task, "rows": rows, "seed": seed, "options": options, "index": index}
        yield {
            "problem": str(entry["question"]),
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "reasoning_gym": json.dumps(where),
        }


def _package(source: str) -> Any:
    try:
        importlib.import_module("reasoning_gym.factory")
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(
            f"source={source!r} needs the package reasoning-gym ({error}): pip install 'trl-grpo-ext[reasoning-gym]'"
        ) from error


def _version(gym: Any) -> str:
    return str(getattr(gym, "__version__", ""))


def _literal(value: str) -> Any:
    """A value of `config`: JSON where it is, text where it is not."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
