"""One call of a reward function, and what came of it. No torch: this runs in reward workers too."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from trl_grpo_ext.rewards.step_rewards import StepRewards, is_step_reward

_SHOWN_CHARS = 2_000
_SHOWN_FRAMES = 5
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no value. Kinds: "raised", "timeout", "died" (its process), and "count" and "value" of a result."""

    kind: str
    message: str
    trace: str = ""  # of an exception, its last lines


@dataclass(slots=True)
class Outcome:
    """What a call returned for its B completions, or why it returned nothing.

    A single value that is no reward (NaN, text, ...) does not spoil the others: it stands in `problems`.
    """

    # B floats, or StepRewards of a step reward; None where the function said so, or has a problem
    values: list[Any] = field(default_factory=list)
    problems: dict[int, Problem] = field(default_factory=dict)  # completion -> what is wrong with its value
    failed: Problem | None = None  # the call as a whole; there are no values then
    extras: list[tuple[str, list[Any]]] = field(default_factory=list)  # calls of `log_extra`
    metrics: list[tuple[str, float]] = field(default_factory=list)  # calls of `log_metric`

    def packed(self) -> list[float | None] | bytes:
        """For another process, which pickles many of them at once: plain numbers as they are, anything else pickled."""
        plain = not (self.problems or self.failed or self.extras or self.metrics)
        if plain and all(type(value) is float or value is None for value in self.values):
            return self.values
        try:
            return pickle.dumps(self)
        except Exception as error:  # of something that was logged
            return pickle.dumps(Outcome(failed=raised(error)))

    @classmethod
    def unpacked(cls, content: list[float | None] | bytes) -> Outcome:
        """What `packed` packed."""
        if not isinstance(content, bytes):
            return cls(values=content)
        try:
            return cast("Outcome", pickle.loads(content))
        except Exception as error:  # something that was logged is of a class that only the worker has
            return cls(failed=raised(error))


def call_reward(function: Callable[..., Any], kwargs: Mapping[str, Any], hooks: Mapping[str, Any]) -> Outcome:
    """Call it and judge what it returns; raises nothing, whatever it does, but for an interrupt by the user."""
    outcome = Outcome()
    try:
        output = function(**kwargs, **hooks, **logging_hooks(outcome))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a reward must not end the run
        return Outcome(failed=raised(error))
    return judge(output, len(kwargs["completions"]), outcome, converter_of(function))


def converter_of(function: Any) -> Callable[[Any], Any]:
    """What makes a reward of a value that the function returned; None of what is none."""
    return as_steps if is_step_reward(function) else as_number


def logging_hooks(outcome: Outcome) -> dict[str, Callable[[str, Any], None]]:
    """`log_extra` and `log_metric`, which take notes in the outcome."""
    return {
        "log_extra": lambda column, values: outcome.extras.append((column, list(values))),
        "log_metric": lambda name, value: outcome.metrics.append((name, float(value))),
    }


def judge(output: Any, expected: int, outcome: Outcome, convert: Callable[[Any], Any]) -> Outcome:
    """Put what a reward returned for `expected` completions into `outcome`, each value converted or None."""
    kind = "number" if convert is as_number else "StepRewards"
    rule = f"expected {expected} value{'s' * (expected != 1)}: one {kind} or None per completion"
    if not isinstance(output, Iterable) or isinstance(output, (str, bytes, Mapping)):
        return Outcome(failed=Problem("count", f"returned {short(output)} ({type(output).__name__}), {rule}"))
    try:
        values = list(output)
        if len(values) != expected:
            return Outcome(failed=Problem("count", f"returned {len(values)} values, {rule}"))
        rewards = [convert(value) for value in values]
    except Exception as error:  # a generator, or a number class of somebody's own
        return Outcome(failed=raised(error))
    outcome.values = rewards
    for index, (value, reward) in enumerate(zip(values, rewards, strict=True)):
        if reward is None and value is not None:
            what = f"returned {short(value)} ({type(value).__name__}): neither a finite {kind} nor None"
            outcome.problems[index] = Problem("value", what)
    return outcome


def raised(error: BaseException) -> Problem:
    """An exception as a problem."""
    trace = "".join(traceback.format_exception(error, limit=-_SHOWN_FRAMES))
    return Problem(
        "raised", f"raised {type(error).__name__}: {_printable(str(error))}", _printable(trace[-_SHOWN_CHARS:])
    )


def as_number(value: Any) -> float | None:
    """The value as a float if it is a finite number (in float32), scalars of NumPy and torch included; else None."""
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    # The comparison is False for NaN, for infinities, and for what float32 would round to one.
    return float(plain) if isinstance(plain, (int, float)) and abs(plain) <= _FLOAT32_MAX else None


def as_steps(value: Any) -> StepRewards | None:
    """The value if it is a `StepRewards` whose rewards are finite numbers or None; else None."""
    if not isinstance(value, StepRewards):
        return None
    rewards = [as_number(reward) for reward in value.rewards]
    if any(new is None and old is not None for new, old in zip(rewards, value.rewards, strict=True)):
        return None
    return StepRewards(rewards, list(value.ends))


def short(value: Any) -> str:
    """`repr`, cut to a length that fits a message."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<a {type(value).__name__} whose repr raises {type(error).__name__}>"
    return _cut(text)


def _printable(text: str) -> str:
    """Text without what a terminal would obey or could not encode: control characters, unpaired surrogates."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in _cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"
