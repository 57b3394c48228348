"""Prompts from a file: one per line, as text or as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .prompts import Prompt, form_problem


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts of a text file (a line each) or a JSON Lines file (`.jsonl`), whose lines are `{"prompt": ...}` or
    the prompt itself, a string or a list of messages. Blank lines are passed over.

    Raises:
        ValueError: if there is no such file, it has no prompts, or a line is not one.
    """
    return [prompt for _, prompt in numbered_prompts(path)]


def numbered_prompts(path: str | os.PathLike[str]) -> list[tuple[int, Prompt]]:
    """The same, each with the number of its line.

    Raises:
        ValueError: as in `read_prompts`.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not at the separators that a prompt may hold
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={str(file)!r} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts={str(file)!r} has no prompts: it is empty. Write one per line.")
    if file.suffix not in (".jsonl", ".json"):
        return list(numbered)
    prompts: list[tuple[int, Prompt]] = []
    for number, line in numbered:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts={str(file)!r}, line {number} is not JSON: {error}") from error
        if isinstance(value, dict):
            if "prompt" not in value:
                raise ValueError(f"prompts={str(file)!r}, line {number} has no 'prompt' (its keys: {sorted(value)})")
            value = value["prompt"]
        if problem := form_problem(value):
            raise ValueError(f"prompts={str(file)!r}, line {number}: the prompt {problem}")
        prompts.append((number, value))
    return prompts
