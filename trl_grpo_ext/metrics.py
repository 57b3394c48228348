"""Metrics between two logs, under TRL's names."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import nanstd, print_prompt_completions_sample

from .experience import MicroBatch, StepBatch
from .objective import LossTerms, combine_rewards
from .policy import TokenScores


class MetricLog:
    """Collects values until the next log.

    Values recorded once per step are averaged over the steps. Per-token quantities are kept as a sum and a count, over
    all processes, so that a short micro-batch weighs less than a long one.
    """

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)
        self._sums: dict[str, torch.Tensor] = {}  # name -> (total, count)
        self._extremes: dict[str, tuple[list[torch.Tensor], Callable[[Iterable[float]], float]]] = {}

    def record(self, name: str, value: float) -> None:
        """One value for this step."""
        self._values[name].append(float(value))

    def latest(self, name: str, value: float) -> None:
        """A running total, of which the last value counts."""
        self._values[name] = [float(value)]

    def accumulate(self, name: str, total: torch.Tensor, count: torch.Tensor | float) -> None:
        """A sum over tokens (or completions) of one micro-batch, and their number."""
        pair = torch.stack([total.detach().float(), torch.as_tensor(count, device=total.device).float()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def extreme(self, name: str, value: torch.Tensor, choose: Callable[[Iterable[float]], float]) -> None:
        """The smallest or largest (`choose`: `min` or `max`) since the last log."""
        # Kept as tensors, because asking for a value waits for the device
        self._extremes.setdefault(name, ([], choose))[0].append(value.detach())

    def flush(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Everything since the last flush; None where there was nothing but NaN (JSON has no NaN)."""
        metrics: dict[str, float | None] = {}
        for name, values in self._values.items():
            valid = [value for value in values if not math.isnan(value)]
            metrics[name] = sum(valid) / len(valid) if valid else None
        for name in sorted(self._sums):
            total, count = accelerator.reduce(self._sums[name], reduction="sum").tolist()
            metrics[name] = total / count if count else None
        for name, (tensors, choose) in sorted(self._extremes.items()):
            metrics[name] = choose(gather_object([choose(torch.stack(tensors).tolist())]))
        self._extremes.clear()
        self._values.clear()
        self._sums.clear()
        return metrics


class StepClock(TrainerCallback):
    """Seconds of an optimizer step: rollouts, rewards, and the update, which is the rest."""

    def __init__(self, metrics: MetricLog) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._spent: defaultdict[str, float] = defaultdict(float)

    def start_step(self) -> None:
        """Called before the rows of a step are read."""
        self._started = time.perf_counter()
        self._spent.clear()

    def spend(self, name: str, seconds: float) -> None:
        """Book part of this step under `time/<name>`."""
        self._spent[name] += seconds

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step is over: the optimizer has moved."""
        total = time.perf_counter() - self._started
        for name in ("rollout", "reward"):
            self._metrics.record(f"time/{name}", self._spent[name])
        self._metrics.record("time/update", total - self._spent["rollout"] - self._spent["reward"])
        self._metrics.record("step_time", total)


class CompletionLog:
    """The latest generation's completions: printed with rich, kept as Parquet (`log_completions=True`), as TRL does."""

    def __init__(self, output_dir: str, num_to_print: int | None) -> None:
        self._folder = Path(output_dir) / "completions"
        self._num_to_print = num_to_print
        self._columns: dict[str, list[Any]] = {}
        self._rewards: list[str] = []

    def update(
        self,
        prompts: list[Any],
        completions: list[Any],
        rewards: dict[str, list[float]],
        advantages: list[float],
        extra: dict[str, list[Any]],
    ) -> None:
        """Replace what is kept."""
        self._rewards = list(rewards)
        self._columns = {"prompt": prompts, "completion": completions, **rewards, **extra, "advantage": advantages}

    def write(self, step: int) -> None:
        """Print and save what is kept, if there is anything."""
        if not self._columns:
            return
        columns = self._columns
        print_prompt_completions_sample(
            columns["prompt"],
            columns["completion"],
            {name: columns[name] for name in self._rewards},
            columns["advantage"],
            step,
            self._num_to_print,  # type: ignore[arg-type]  # None, for all, is TRL's own default
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        table = Dataset.from_dict({"step": [step] * len(columns["prompt"]), **columns})
        table.to_parquet(self._folder / f"completions_{step:05d}.parquet")


def reward_metrics(rewards: torch.Tensor, names: Sequence[str], weights: torch.Tensor) -> dict[str, float]:
    """`rewards/<name>/mean|std`, `reward` and `reward_std` from `(B, K)` rewards; NaN stands for None.

    A metric is NaN where there is no reward to take it of.
    """
    metrics = {}
    for k, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = rewards[:, k].nanmean().item()
        metrics[f"rewards/{name}/std"] = nanstd(rewards[:, k]).item()
    total = combine_rewards(rewards, weights)
    return metrics | {"reward": total.nanmean().item(), "reward_std": nanstd(total).item()}


def record_loss_terms(log: MetricLog, terms: LossTerms, scores: TokenScores, mask: torch.Tensor) -> None:
    """`kl`, `entropy` and `clip_ratio/*` of one micro-batch, as sums over its tokens."""
    tokens = mask.sum()
    if scores.entropy is not None:
        log.accumulate("entropy", (scores.entropy * mask).sum(), tokens)
    if terms.per_token_kl is not None:
        log.accumulate("kl", (terms.per_token_kl * mask).sum(), tokens)
    clipped = {"low": terms.is_low_clipped, "high": terms.is_high_clipped}
    clipped["region"] = clipped["low"] | clipped["high"]
    for side, indicator in clipped.items():
        per_token = indicator.shape[1] > 1 or mask.shape[1] == 1
        total, count = ((indicator & mask).sum(), tokens) if per_token else (indicator.sum(), len(indicator))
        log.accumulate(f"clip_ratio/{side}_mean", total, count)
    lengths = mask.sum(dim=1).clamp(min=1)
    low = (clipped["low"] & mask).sum(dim=1) / lengths
    high = (clipped["high"] & mask).sum(dim=1) / lengths
    log.extreme("clip_ratio/low_min", low.min(), min)
    log.extreme("clip_ratio/high_max", high.max(), max)


def record_micro_batches(
    log: MetricLog, step: StepBatch, chosen: Sequence[int], batches: Sequence[MicroBatch | None], batch_size: int
) -> None:
    """How many completions are skipped, and the update's tokens against those of the step's padded micro-batches."""
    lengths = [len(ids) for ids in step.completion_ids]
    prompts = [len(step.prompt_ids[p]) for p in step.prompt_of]
    padded = 0
    for start in range(0, len(lengths), batch_size):
        stop = min(start + batch_size, len(lengths))
        padded += (stop - start) * (max(prompts[start:stop]) + max(lengths[start:stop]))
    full = [batch for batch in batches if batch is not None]
    rows = [b.row.layout.num_tokens if b.row else sum(map(len, (*b.prompt_ids, *b.completion_ids))) for b in full]
    log.record("frac_completions_skipped", 1 - len(chosen) / len(lengths))
    log.record("tokens/packed", sum(rows))
    log.record("tokens/padded_equivalent", padded)


def length_metrics(lengths: torch.Tensor, ended: torch.Tensor) -> dict[str, float]:
    """`completions/*` from `(B,)` lengths and whether each completion ended by itself."""
    lengths = lengths.float()
    terminated = lengths[ended] if bool(ended.any()) else torch.zeros(1)
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1.0 - ended.float().mean().item(),
        "completions/mean_terminated_length": terminated.mean().item(),
        "completions/min_terminated_length": terminated.min().item(),
        "completions/max_terminated_length": terminated.max().item(),
    }
