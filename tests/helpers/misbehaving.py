"""Rewards that do what a completion tells them to, imported by the workers too: nothing heavy may be imported here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def _act(completion: str) -> Any:
    """`ok` and anything unknown are worth their length."""
    action, _, argument = completion.partition(":")
    if action == "raise":
        raise ValueError(f"cannot judge {argument}")
    if action == "hang":
        while True:
            pass
    if action == "sleep":
        time.sleep(float(argument))
    if action == "memory":
        return float(len(bytearray(int(argument) * 2**20)))
    if action == "exit":
        sys.exit(3)
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "child":  # leaves a process of its own behind, then hangs
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(argument).write_text(str(child.pid))
        time.sleep(600)
    values = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1.0", "huge": 1e300}
    return values.get(action, float(len(completion)))


def whole_batch(completions: list[str], **kwargs: Any) -> list[Any]:
    """Unmarked: called on the whole batch first."""
    return [_act(completion) for completion in completions]


def by_row(completions: list[str], **kwargs: Any) -> list[Any]:
    """Marked as row-wise."""
    return [_act(completion) for completion in completions]


by_row.reward_is_row_wise = True  # type: ignore[attr-defined]


def reads_thing(completions: list[str], thing: list[Any], **kwargs: Any) -> list[Any]:
    """Row-wise, and looks at a column."""
    return [_act(completion) for completion, _ in zip(completions, thing, strict=True)]


reads_thing.reward_is_row_wise = True  # type: ignore[attr-defined]


def counted(prompts: list[str], completions: list[str], count_file: list[str], **kwargs: Any) -> list[float]:
    """Row-wise; notes every completion that it is called on."""
    for completion, name in zip(completions, count_file, strict=True):
        with open(name, "a", encoding="utf-8") as file:
            file.write(completion + "\n")
    return [float(len(completion)) for completion in completions]


counted.reward_is_row_wise = True  # type: ignore[attr-defined]


def worth(completions: list[str], points: list[float], **kwargs: Any) -> list[float]:
    """Row-wise; a column is the reward."""
    return list(points)


worth.reward_is_row_wise = True  # type: ignore[attr-defined]


def noted(completions: list[str], count_file: list[str], **kwargs: Any) -> list[Any]:
    """Unmarked; notes how many completions it is called on."""
    with open(count_file[0], "a", encoding="utf-8") as file:
        file.write(f"{len(completions)} ")
    return [_act(completion) for completion in completions]


def history_length(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    """How much of the run's log a reward sees."""
    return [float(len(trainer_state.log_history))] * len(completions)


def wrong_count(completions: list[str], **kwargs: Any) -> list[float]:
    """One value too few wherever there is a `bad` completion; right on any other batch."""
    return [1.0] * (len(completions) - ("bad" in completions))


def relative(completions: list[str], **kwargs: Any) -> list[float]:
    """Depends on the whole batch: the rank by length."""
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    return [float(order.index(i)) for i in range(len(completions))]


def talkative(
    completions: list[str], trainer_state: Any, log_extra: Any, log_metric: Any, **kwargs: Any
) -> list[float]:
    """Uses every hook."""
    log_extra("double", [completion * 2 for completion in completions])
    log_metric("longest", max(map(len, completions)))
    return [float(trainer_state.global_step)] * len(completions)


def logs_each_row(completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[Any]:
    """Row-wise; logs each completion's length. What a `lock` logs cannot be pickled, what a `class` logs only here."""
    log_extra("shout", [completion.upper() for completion in completions])
    log_metric("length", sum(map(len, completions)) / len(completions))
    if "lock" in completions:
        log_extra("lock", [threading.Lock()])
    if "class" in completions:
        log_extra("class", [_OnlyHere()])
    return [_act(completion) for completion in completions]


logs_each_row.reward_is_row_wise = True  # type: ignore[attr-defined]


class _OnlyHere:
    """Can be pickled, and not be unpickled in another process."""

    def __reduce__(self) -> Any:
        return _only_in, (os.getpid(),)


def _only_in(process: int) -> str:
    if os.getpid() != process:
        raise RuntimeError("not here")
    return "here"


class Unpicklable:
    """A value of a column whose own pickling code raises."""

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickling")


def process_id(completions: list[str], **kwargs: Any) -> list[float]:
    """Where it runs."""
    return [float(os.getpid())] * len(completions)


async def awaited(completions: list[str], **kwargs: Any) -> list[Any]:
    """Async: `hang` never answers, `block` blocks the loop."""
    import asyncio

    for completion in completions:
        if completion == "hang":
            await asyncio.sleep(600)
        if completion == "block":
            time.sleep(8)
    return [_act(completion) for completion in completions]


class Picklable:
    """A callable object with an option."""

    __name__ = "picklable"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [self.factor * len(completion) for completion in completions]
