"""Which arguments of a reward function are left out of what is sent to a worker."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest

from trl_grpo_ext.rewards.accuracy import accuracy_reward
from trl_grpo_ext.rewards.arguments import readable_arguments


def untouched(completions: Any, solution: Any = None, *, level: int = 1, **kwargs: Any) -> Any:
    return [level if solution else 0.0 for _ in completions]


def positional(completions: Any, *others: Any, **kwargs: Any) -> Any:
    return [len(others)] * len(completions)


def looked_up(completions: Any, **kwargs: Any) -> Any:
    return kwargs["completion_ids"]


def handed_on(completions: Any, **kwargs: Any) -> Any:
    return untouched(completions, **kwargs)


def in_a_comprehension(completions: Any, **kwargs: Any) -> Any:
    return [kwargs.get(name) for name in completions]


def in_a_function_inside(completions: Any, **kwargs: Any) -> Any:
    return list(map(lambda name: kwargs[name], completions))


def replaced(completions: Any, **kwargs: Any) -> Any:
    kwargs = {}
    return kwargs


def by_locals(completions: Any, **kwargs: Any) -> Any:
    return locals()["kwargs"]


def by_its_frame(completions: Any, **kwargs: Any) -> Any:
    frame = inspect.currentframe()
    return frame.f_locals["kwargs"] if frame else None


def without_rest(completions: Any, solution: Any) -> Any:
    return solution


@functools.wraps(untouched)
def wrapper(*args: Any, **kwargs: Any) -> Any:
    return untouched(*args, **kwargs)


class Judge:
    def __call__(self, completions: Any, **kwargs: Any) -> Any:
        return [1.0] * len(completions)

    def method(self, prompts: Any, completions: Any, **kwargs: Any) -> Any:
        return prompts


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (untouched, {"completions", "solution", "level"}),
        (positional, {"completions"}),
        (functools.partial(untouched, level=2), {"completions", "solution", "level"}),
        (Judge(), {"self", "completions"}),
        (Judge().method, {"self", "prompts", "completions"}),
        (accuracy_reward, {"completions", "solution", "answer"}),
        (lambda completions, **kwargs: [1.0], {"completions"}),
        *[
            (function, None)
            for function in (
                looked_up, handed_on, in_a_comprehension, in_a_function_inside, replaced, by_locals, by_its_frame,
                without_rest, wrapper, Judge, print, functools.partial(print),
            )
        ],
    ],
)  # fmt: skip
def test_what_a_function_can_read(function: Any, names: set[str] | None) -> None:
    assert readable_arguments(function) == names
