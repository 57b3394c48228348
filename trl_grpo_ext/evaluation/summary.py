"""From judged completions to the numbers of a report, overall and by level, subject or whatever else rows say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .estimates import maj_at_k, pass_at_k
from .intervals import compare_paired, estimate_mean
from .judged import Judged

Floats = NDArray[np.float64]
Group = Sequence[Judged]  # one prompt's completions by one policy, in the order in which they were drawn
PerPrompt = dict[str, Floats]  # metric -> (P,) values, NaN where a prompt has none

_RATES = (0.0, 1.0)


def per_prompt(groups: Sequence[Group], ks: Sequence[int]) -> PerPrompt:
    """Every metric of every prompt.

    `pass@k`, `maj@k` (for k above 1) and `avg@G` are over completions that have a reward: a prompt with fewer than k of
    them has no `pass@k`. `format` is the share of completions whose format reward is 1.

    Args:
        groups: P groups of G completions.
        ks: each in 1..G.

    Returns:
        `(P,)` values by metric; a metric that no prompt has is left out.
    """
    size = max(len(group) for group in groups)
    measures: dict[str, Callable[[Group], float]] = {}
    for k in ks:
        measures[f"pass@{k}"] = _of_scored(k, partial(_pass_at, k))
    measures[f"avg@{size}"] = _of_scored(1, lambda scored: _right(scored) / len(scored))
    for k in ks:
        if k > 1:
            measures[f"maj@{k}"] = _of_scored(k, partial(_maj_at, k))
    measures["format"] = _format_rate
    measures["no_answer"] = lambda group: sum(j.answer is None for j in group) / len(group)
    measures["truncated"] = lambda group: sum(j.finish_reason == "length" for j in group) / len(group)
    measures["mean_length"] = lambda group: sum(j.tokens for j in group) / len(group)
    values = {name: np.array([measure(group) for group in groups], float) for name, measure in measures.items()}
    return {name: found for name, found in values.items() if not np.isnan(found).all()}


def summarise(
    values: Mapping[str, PerPrompt], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Means with intervals of each policy, and the paired difference where there are two, ready for JSON.

    Args:
        values: `per_prompt` of "base", "adapter", or both.
        level, resamples, seed: as in `estimate_mean`.

    Returns:
        `{"base": {metric: {mean, low, high, prompts}}, "adapter": ..., "difference": {metric: {..., p_value}}}`.
    """
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    found: dict[str, Any] = {}
    for who, metrics in values.items():
        found[who] = {
            name: asdict(estimate_mean(x[~np.isnan(x)], bounds=bounds_of(name), **options))
            for name, x in metrics.items()
        }
    if len(values) == 2:
        base, adapter = values["base"], values["adapter"]
        found["difference"] = {}
        for name in base:
            both = ~(np.isnan(base[name]) | np.isnan(adapter.get(name, np.full_like(base[name], math.nan))))
            if both.any():
                pair = compare_paired(base[name][both], adapter[name][both], bounds=bounds_of(name), **options)
                found["difference"][name] = asdict(pair)
    return found


def break_down(
    values: Mapping[str, PerPrompt],
    columns: Mapping[str, Sequence[Any]],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`summarise` for the rows of each value of a column.

    Args:
        values: as in `summarise`, P values per metric.
        columns: P values each, such as `level` and `subject`.

    Returns:
        `{column: {value as text: {"prompts": count, **summary}}}`; a column with a single value says nothing new and is
        left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for column, labels in columns.items():
        texts = ["" if label is None else str(label) for label in labels]
        kinds = sorted(set(texts), key=_in_order)
        if len(kinds) < 2:
            continue
        found[column] = {}
        for kind in kinds:
            rows = np.array([text == kind for text in texts])
            some = {
                who: {name: x[rows] for name, x in metrics.items() if not np.isnan(x[rows]).all()}
                for who, metrics in values.items()
            }
            summary = summarise(some, level=level, resamples=resamples, seed=seed)
            found[column][kind] = {"prompts": int(rows.sum()), **summary}
    return found


def bounds_of(metric: str) -> tuple[float, float] | None:
    """All metrics are rates but the length."""
    return None if metric == "mean_length" else _RATES


def _of_scored(fewest: int, measure: Callable[[Group], float]) -> Callable[[Group], float]:
    def of(group: Group) -> float:
        scored = [judged for judged in group if judged.right is not None]
        return measure(scored) if len(scored) >= fewest else math.nan

    return of


def _pass_at(k: int, scored: Group) -> float:
    return float(pass_at_k(len(scored), _right(scored), k)[0])


def _maj_at(k: int, scored: Group) -> float:
    return maj_at_k([one.vote for one in scored], [bool(one.right) for one in scored], k)


def _right(scored: Group) -> int:
    return sum(bool(judged.right) for judged in scored)


def _format_rate(group: Group) -> float:
    judged = [one.format_reward == 1.0 for one in group if one.format_reward is not None]
    return sum(judged) / len(judged) if judged else math.nan


def _in_order(text: str) -> tuple[int, float, str]:
    """Numbers by size, then texts ("Level 2" before "Level 10")."""
    head, _, tail = text.rpartition(" ")
    try:
        return (0, float(tail), head)
    except ValueError:
        return (1, 0.0, text)
