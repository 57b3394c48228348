"""A reward that fails on some completions, and one that says None of the same; imported by reward workers."""

from __future__ import annotations

import time
import zlib
from typing import Any

KINDS = ("raise", "hang", "nan", "none", "count")


def fate(prompt: str, ids: list[int]) -> str:
    """What befalls a completion: one of `KINDS` for about one in five, which is always the same one."""
    draw = zlib.crc32(repr((prompt, ids)).encode()) % 25
    return KINDS[draw] if draw < len(KINDS) else "fine"


def worth(ids: list[int]) -> float:
    """Depends on every token and is rarely the same twice."""
    return sum((i + 1) * token for i, token in enumerate(ids)) % 11 / 3.0


def unreliable(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    """Raises, hangs, returns NaN or None, or too many values."""
    values: list[Any] = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        kind = fate(prompt, ids)
        if kind == "raise":
            raise ValueError("no")
        if kind == "hang":
            time.sleep(600)
        values += {"nan": [float("nan")], "none": [None], "count": [1.0, 1.0]}.get(kind, [worth(ids)])
    return values


def unreliable_row_wise(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    """The same, marked as row-wise."""
    return unreliable(prompts, completion_ids)


unreliable_row_wise.reward_is_row_wise = True  # type: ignore[attr-defined]


def silent(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """None wherever the others fail."""
    return [
        worth(ids) if fate(prompt, ids) == "fine" else None for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]
