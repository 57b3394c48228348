"""Problems made by code: arithmetic and countdown, by seed, with a held-out split that cannot overlap the training one.

Which split a problem belongs to is decided by a hash of what it is about (its numbers and signs, in any order), never
by a seed: a tenth of all problems is "test", under every seed. So `3 + 4` and `4 + 3` are on the same side.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from datasets import Dataset, IterableDataset

from .code import CODE
from .sources import COUNTDOWN_STATEMENT, PROCEDURAL

DEFAULT_ROWS = 10_000
SPLITS = ("train", "test")
_HELD_OUT = 10  # one problem of so many
_TRIES = 200  # per row asked for, before there are found to be too few problems
_SIGNS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
}


def arithmetic(draw: random.Random, terms: int, max_operand: int, signs: str) -> tuple[dict[str, Any], str]:
    """`What is 12 + 34 * 5?`: a row, and what decides its split. Signs bind as in Python."""
    numbers = [draw.randint(0, max_operand) for _ in range(terms)]
    chosen = [draw.choice(signs) for _ in range(terms - 1)]
    words = [str(numbers[0])] + [f"{sign} {number}" for sign, number in zip(chosen, numbers[1:], strict=True)]
    sums: list[int] = [numbers[0]]  # what is added up, once products are taken
    for sign, number in zip(chosen, numbers[1:], strict=True):
        if sign == "*":
            sums[-1] *= number
        else:
            sums.append(number if sign == "+" else -number)
    row = {"problem": f"What is {' '.join(words)}?", "answer": str(sum(sums))}
    return row, f"{sorted(numbers)} {sorted(chosen)}"


def countdown(
    draw: random.Random, min_numbers: int, max_numbers: int, max_number: int, max_target: int
) -> tuple[dict[str, Any], str] | None:
    """Numbers and a target that they make, each used once; None where these do not make one in 1..max_target.

    The task of TinyZero (github.com/Jiayi-Pan/TinyZero); solvable by construction.
    """
    nums = [draw.randint(1, max_number) for _ in range(draw.randint(min_numbers, max_numbers))]
    values = [Fraction(number) for number in nums]
    while len(values) > 1:
        left = values.pop(draw.randrange(len(values)))
        right = values.pop(draw.randrange(len(values)))
        result = _SIGNS[draw.choice("+-*/")](left, right)
        if result is None:
            return None
        values.append(result)
    target = values[0]
    if target.denominator != 1 or not 1 <= target <= max_target:
        return None
    row = {"problem": COUNTDOWN_STATEMENT.format(nums=nums, target=target), "nums": nums, "target": int(target)}
    return row, f"{sorted(nums)} {target}"


# Task: what draws a problem, and its options with their defaults
_TASKS: dict[str, tuple[Callable[..., Any], dict[str, int | str]]] = {
    "arithmetic": (arithmetic, {"terms": 2, "max_operand": 99, "signs": "+-*"}),
    "countdown": (countdown, {"min_numbers": 3, "max_numbers": 4, "max_number": 99, "max_target": 100}),
}


def procedural_rows(
    source: str, task: str, split: str, options: dict[str, str], seed: int, streaming: bool
) -> Dataset | IterableDataset:
    """Distinct problems of a task: `rows` of them (by default 10,000, of the held-out split 1,000), the same ones for
    the same seed and options.

    Raises:
        ValueError: there is no such task, split or option, an option's value does not fit, or there are too few
            different problems.
    """
    if task not in _TASKS:
        raise ValueError(
            f"source={source!r} is not known; procedural are {_names(f'{PROCEDURAL}:{t}' for t in _TASKS)}."
        )
    if split not in SPLITS:
        raise ValueError(f"source={source!r} has no split {split!r}; it has {_names(SPLITS)}.")
    defaults = {"rows": DEFAULT_ROWS if split == "train" else DEFAULT_ROWS // _HELD_OUT, **_TASKS[task][1]}
    for key in options:
        if key not in defaults:
            raise ValueError(f"config of source={source!r} has no option {key!r}; it has {_names(defaults)}.")
    chosen = {key: _value(source, key, options.get(key), default) for key, default in defaults.items()}
    if task == "countdown" and int(chosen["min_numbers"]) > int(chosen["max_numbers"]):
        raise ValueError(
            f"config of source={source!r}: min_numbers={chosen['min_numbers']} is more than max_numbers="
            f"{chosen['max_numbers']}: give both."
        )
    arguments = {"task": task, "split": split, "seed": seed, "code": CODE, **chosen}
    if streaming:
        return IterableDataset.from_generator(generate, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(generate, gen_kwargs=arguments)
    except Exception as error:  # `datasets` wraps what a generator raises
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from error
        raise


def generate(task: str, split: str, seed: int, code: str, rows: int, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of a task. `code` is there for the cache: other code, other rows.

    Raises:
        ValueError: there are fewer different problems than asked for.
    """
    draw = random.Random(f"{task} {split} {seed}")
    make = _TASKS[task][0]
    seen: set[str] = set()
    for _ in range(rows * _TRIES):
        if len(seen) == rows:
            return
        made = make(draw, **options)
        if made is None:
            continue
        row, identity = made
        if split_of(identity) == split and row["problem"] not in seen:
            seen.add(row["problem"])
            yield row
    if len(seen) < rows:
        raise ValueError(
            f"{PROCEDURAL}:{task} has only {len(seen)} different problems in split {split!r} with {options}, not "
            f"rows={rows}: ask for fewer rows, or for larger numbers."
        )


def split_of(identity: str) -> str:
    """The split of a problem: "test" for a tenth of all, by a hash that no seed changes."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _HELD_OUT == 0 else "train"


def _value(source: str, key: str, given: str | None, default: int | str) -> int | str:
    if given is None:
        return default
    if isinstance(default, str):
        if not given or set(given) - set("+-*"):
            raise ValueError(f"config of source={source!r}: {key}={given!r} must be some of + - *, such as '+-'.")
        return given
    least = 2 if key in ("terms", "min_numbers", "max_numbers") else 1
    if not given.isascii() or not given.isdigit() or int(given) < least:
        raise ValueError(f"config of source={source!r}: {key}={given!r} must be a whole number of at least {least}.")
    return int(given)


def _names(names: Any) -> str:
    return ", ".join(names)
