"""Evaluations, of a run's log or by `trl-grpo eval`, with 95 % intervals, in the form of a card's `model-index`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.intervals import wilson_interval

Z = 1.959964  # of 95 %


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An evaluation dataset: what its metrics start with, its name and id, and how many prompts it has."""

    prefix: str  # "eval", or "eval_<name>"
    name: str
    id: str | None
    config: str | None
    split: str | None
    prompts: int | None
    completions_per_prompt: int


@dataclass(frozen=True, slots=True)
class Result:
    """Mean of a metric over an evaluation's prompts or completions, and its interval (None: unknown)."""

    held_out: HeldOut
    metric: str  # "reward", the weighted sum, one reward's name, or pass@k and the like
    mean: float
    interval: tuple[float, float] | None
    step: int | None  # None: after training
    of_base: float | None = None  # the base's mean on the same prompts
    p_value: float | None = None  # of the paired test of the difference
    is_best: bool = False  # of a checkpoint that was loaded when training was over


@dataclass(frozen=True, slots=True)
class BestLoaded:
    """The weights are those of an earlier step (`load_best_model_at_end`)."""

    step: int
    logged: int  # entries of the log that are older than that


def latest_results(
    log_history: Sequence[Mapping[str, Any]], datasets: Sequence[HeldOut], best: BestLoaded | None = None
) -> list[Result]:
    """The last evaluation of each dataset by the weights that there are: the weighted sum of rewards first, then each
    reward.
    """
    results = []
    for held_out in datasets:
        prefix = held_out.prefix
        entries = [
            e
            for i, e in enumerate(log_history)
            if f"{prefix}_reward" in e and (best is None or i >= best.logged or e["step"] == best.step)
        ]
        if not entries:
            continue
        entry = entries[-1]
        step = int(entry["step"]) if best is None else best.step
        names = {"reward": (f"{prefix}_reward", f"{prefix}_reward_std")}
        start = f"{prefix}_rewards/"
        for key in entry:
            if key.startswith(start) and key.endswith("/mean"):
                names[key[len(start) : -len("/mean")]] = (key, key.removesuffix("mean") + "std")
            elif key.startswith(f"{prefix}_pass@"):
                names[key[len(prefix) + 1 :]] = (key, "")  # of prompts, whose spread is not in the log
        for metric, (mean_key, std_key) in names.items():
            mean = entry[mean_key]
            if mean is None or not math.isfinite(mean):
                continue
            interval = _interval(mean, entry.get(std_key), held_out)
            results.append(Result(held_out, metric, mean, interval, step, is_best=best is not None))
    return results


def _interval(mean: float, std: float | None, held_out: HeldOut) -> tuple[float, float] | None:
    if std is None or not math.isfinite(std) or not held_out.prompts:
        return None
    return confidence_interval(mean, std, held_out.prompts, held_out.prompts * held_out.completions_per_prompt)


def confidence_interval(mean: float, std: float, prompts: int, completions: int) -> tuple[float, float]:
    """95 % interval of a mean reward: Wilson's where rewards are 0 or 1, the normal one otherwise.

    Completions of one prompt are alike, so that what counts is prompts: with several completions each, the interval is
    wider than need be rather than too narrow. Rewards are taken to be 0 or 1 where their sample standard deviation
    `std` over `completions` is that of such rewards, `sqrt(mean (1 - mean) n / (n - 1))`.

    Wilson (1927): `(mean + z^2/2n +- z sqrt(mean (1 - mean)/n + z^2/4n^2)) / (1 + z^2/n)`.
    """
    if 0.0 <= mean <= 1.0 and completions > 1:
        of_zeros_and_ones = math.sqrt(mean * (1 - mean) * completions / (completions - 1))
        if math.isclose(std, of_zeros_and_ones, rel_tol=1e-4, abs_tol=1e-6):
            return wilson_interval(mean, prompts)
    half = Z * std / math.sqrt(prompts)
    return mean - half, mean + half


def results_of(summary: Mapping[str, Any]) -> list[Result]:
    """What `trl-grpo eval` found (`evaluation.json`), of the adapter if there is one, as rows of a card.

    Raises:
        ValueError: its intervals are not of 95 %, as all of a card are.
    """
    if summary["settings"]["confidence"] != 0.95:
        raise ValueError(
            f"confidence={summary['settings']['confidence']} of the evaluation must be 0.95, that of all intervals of "
            "a card: evaluate with --confidence 0.95."
        )
    found, data = summary["results"], summary["data"]
    who = "adapter" if "adapter" in found else "base"
    held_out = HeldOut(
        prefix="",
        name=data.get("id") or ", ".join(Path(source).name for source in data.get("sources", [])) or "held-out prompts",
        id=data.get("id"),
        config=data.get("config"),
        split=data.get("split"),
        prompts=summary["prompts"],
        completions_per_prompt=summary["settings"]["num_generations"],
    )
    base = found["base"] if who == "adapter" and "base" in found else {}
    difference = found.get("difference", {})
    return [
        Result(
            replace(held_out, prompts=estimate["prompts"]),
            metric,
            estimate["mean"],
            None if estimate["low"] is None else (estimate["low"], estimate["high"]),
            None,
            of_base=base.get(metric, {}).get("mean"),
            p_value=difference.get(metric, {}).get("p_value"),
        )
        for metric, estimate in found[who].items()
    ]


def as_eval_results(results: Sequence[Result]) -> list[EvalResult]:
    """The same for `ModelCardData(eval_results=...)`. The interval is in the metric's arguments."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=result.held_out.id or "custom",
            dataset_name=result.held_out.name,
            dataset_config=result.held_out.config,  # what tells two datasets of one type apart
            dataset_split=result.held_out.split,
            metric_type=_metric_type(result.metric),
            metric_name=f"{result.metric} (mean over held-out {'prompts' if result.step is None else 'completions'})",
            metric_value=round(result.mean, 6),
            metric_args=_metric_args(result),
        )
        for result in results
    ]


def _metric_type(metric: str) -> str:
    if metric.startswith("pass@"):
        return "pass@k"
    if metric in ("format", "no_answer", "truncated", "mean_length"):
        return metric
    return "accuracy" if metric.startswith(("avg@", "maj@")) or "accuracy" in metric else "reward"


def _metric_args(result: Result) -> dict[str, Any]:
    args: dict[str, Any] = {
        "prompts": result.held_out.prompts,
        "completions_per_prompt": result.held_out.completions_per_prompt,
        "step": result.step,
        "base": None if result.of_base is None else round(result.of_base, 6),
        "p_value": result.p_value,
    }
    if result.interval is not None:
        args["confidence_interval_95"] = [round(bound, 6) for bound in result.interval]
    return {name: value for name, value in args.items() if value is not None}
