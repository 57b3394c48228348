"""Several rewards as one: a weighted sum, in which a reward can depend on others (gates)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_grpo_ext.rewards.marks import is_in_process, is_row_wise
from trl_grpo_ext.rewards.outcome import as_number, short


def combine(
    rewards: Sequence[Callable[..., Any]],
    weights: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    gates: Mapping[str, Mapping[str, float]] | None = None,
    closed: float = 0.0,
    metric_name: str = "combined_reward",
) -> CombinedReward:
    """One reward function out of several: for completion `i`, over the parts `k` that have a value for it,

        r_i = sum_k w_k * (r_ik if every gate of k is open for i, else closed)

    A gate is another part's value, before weights, at or above a number:

        combine([think_answer_format_reward, accuracy_reward], [0.2, 1.0],
                gates={"accuracy_reward": {"think_answer_format_reward": 1.0}})

    pays for a right answer only in the right format.

    **None.** A part that returns None for a completion is left out of its sum, as TRL leaves out reward functions; a
    part whose gate is None is left out too, as nobody can say whether it counts. A completion for which every part is
    left out gets None.

    **Metrics.** `rewards/<metric_name>/<part>/mean`, of the part's own values, gates aside, and for a part with gates
    `rewards/<metric_name>/<part>/gated`, the share of completions for which they were closed.

    Args:
        rewards: the parts: reward functions, not async ones.
        weights: one for each part; 1.0 by default.
        names: to log and gate the parts by; by default each function's own.
        gates: part -> gate -> least value at which it is open.
        closed: what a part counts, before its weight, while a gate of it is closed. A part that can be negative (the
            cosine length reward) needs the worst of its values here, or breaking the gate would be a way out.
        metric_name: the name that the sum is logged by.

    Raises:
        ValueError: no parts; a wrong number of weights or names; equal names; a gate that names no other part.
        TypeError: a part is not callable, or is async.
    """
    parts = list(rewards)
    if not parts:
        raise ValueError("`rewards` is empty: combine at least one reward function.")
    for index, part in enumerate(parts):
        if isinstance(part, str) or not callable(part):
            raise TypeError(f"`rewards[{index}]` is {short(part)} ({type(part).__name__}): it must be callable.")
        if is_async(part):
            raise TypeError(
                f"`rewards[{index}]` ({reward_name(part)}) is async, and a sum cannot wait for it: hand it to the "
                f"trainer as a reward function of its own."
            )
    shares = [1.0] * len(parts) if weights is None else [_number(f"weights[{k}]", w) for k, w in enumerate(weights)]
    titles = [reward_name(part) for part in parts] if names is None else list(names)
    for field, values in (("weights", shares), ("names", titles)):
        if len(values) != len(parts):
            raise ValueError(f"`{field}` has {len(values)} entries for {len(parts)} rewards: give one for each.")
    repeated = sorted({title for title in titles if titles.count(title) > 1})
    if repeated:
        raise ValueError(f"the parts' names {repeated} occur more than once: tell them apart by `names`.")
    checked = {part: _checked_gates(part, dict(least), titles) for part, least in (gates or {}).items()}
    named = dict(zip(titles, parts, strict=True))
    return CombinedReward(named, shares, checked, _number("closed", closed), metric_name)


class CombinedReward:
    """What `combine` returns: a reward function, picklable if its parts are."""

    def __init__(
        self,
        parts: Mapping[str, Callable[..., Any]],
        weights: Sequence[float],
        gates: Mapping[str, Mapping[str, float]],
        closed: float,
        metric_name: str,
    ) -> None:
        self.parts, self.weights = dict(parts), list(weights)
        self.gates, self.closed = {part: dict(least) for part, least in gates.items()}, closed
        self.__name__ = metric_name
        self.reward_is_row_wise = all(map(is_row_wise, self.parts.values()))
        self.reward_runs_in_process = any(map(is_in_process, self.parts.values()))

    def __call__(
        self, completions: Sequence[Any], log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float | None]:
        """`B` rewards of `B` completions.

        Args:
            completions: handed to every part, with all of `columns`.
            log_metric: the trainer's hook; parts get it too.
            **columns: prompts, completion_ids, the dataset's columns and whatever else a trainer passes.

        Raises:
            ValueError: a part returned a wrong number of values, or one that is neither a finite number nor None.
        """
        arguments = {"completions": completions, **columns}
        if log_metric is not None:
            arguments["log_metric"] = log_metric
        values = {name: _checked_values(name, part(**arguments), len(completions)) for name, part in self.parts.items()}
        rows = [{name: column[index] for name, column in values.items()} for index in range(len(completions))]
        if log_metric is not None:
            self._log(log_metric, rows)
        return [self._sum(row) for row in rows]

    def _sum(self, row: Mapping[str, float | None]) -> float | None:
        terms = [
            weight * (value if is_open else self.closed)
            for (name, value), weight in zip(row.items(), self.weights, strict=True)
            if value is not None and (is_open := self._is_open(name, row)) is not None
        ]
        return sum(terms) if terms else None

    def _is_open(self, name: str, row: Mapping[str, float | None]) -> bool | None:
        """Whether a part counts for a completion; None if a gate has no value and no other one is closed."""
        states = [(row[gate], least) for gate, least in self.gates.get(name, {}).items()]
        if any(value is not None and value < least for value, least in states):
            return False
        return None if any(value is None for value, _ in states) else True

    def _log(self, log_metric: Callable[[str, float], None], rows: Sequence[Mapping[str, float | None]]) -> None:
        for name in self.parts:
            values = [value for row in rows if (value := row[name]) is not None]
            if values:  # a mean of nothing is no number, and TRL would average it in
                log_metric(f"rewards/{self.__name__}/{name}/mean", sum(values) / len(values))
            if name in self.gates and rows:
                shut = sum(self._is_open(name, row) is False for row in rows)
                log_metric(f"rewards/{self.__name__}/{name}/gated", shut / len(rows))


def reward_name(reward: Callable[..., Any]) -> str:
    """The name that TRL logs a reward function by (`trl.trainer.utils.get_callable_name`, which imports torch)."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def is_async(reward: Callable[..., Any]) -> bool:
    """Whether TRL would await what it returns (`trl.trainer.utils.is_async_callable`, which imports torch)."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def _checked_gates(part: str, least: dict[str, float], titles: Sequence[str]) -> dict[str, float]:
    for name in (part, *least):
        if name not in titles:
            raise ValueError(f"`gates` names {name!r}, which is none of the parts {list(titles)}.")
    if part in least:
        raise ValueError(f"`gates` makes {part!r} depend on itself: name another part.")
    return {gate: _number(f"gates[{part!r}][{gate!r}]", value) for gate, value in least.items()}


def _checked_values(name: str, output: Any, expected: int) -> list[float | None]:
    values = list(output)
    if len(values) != expected:
        raise ValueError(
            f"the part {name!r} returned {len(values)} values for {expected} completions: it must return one number or "
            f"None for each."
        )
    numbers = [as_number(value) for value in values]
    for index, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if number is None and value is not None:
            raise ValueError(
                f"the part {name!r} returned {short(value)} for completion {index}: neither a finite number nor None."
            )
    return numbers


def _number(field: str, value: Any) -> float:
    number = None if isinstance(value, bool) else as_number(value)
    if number is None:
        raise TypeError(f"`{field}` must be a finite number, got {short(value)} ({type(value).__name__}).")
    return number
