"""How hard prompts are for a model: `n` completions of each, and the share of them that passes.

A prompt that the model never solves, or always, has no spread of rewards and teaches GRPO nothing. Pass rates are kept
as columns beside the prompts: `pass_rate`, `pass_count` and `samples`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .data import PASS, EncodedPrompt, PromptEncoder
from .partial_file import PartialFile, rows_hash, weights_hash
from .policy import base_model_of
from .rewards import Limits, RewardScorer
from .rollout import GroupSampler, SamplingParams
from .side_by_side import LoadedPolicy, encode_prompts, group_sampler

COLUMNS = ("pass_rate", "pass_count", "samples")
WRITERS: dict[str, Callable[[Dataset, Path], object]] = {
    ".jsonl": lambda rows, path: rows.to_json(path, force_ascii=False),
    ".parquet": lambda rows, path: rows.to_parquet(path),
}


@dataclass(frozen=True, slots=True)
class Counted:
    """What one prompt's completions were worth."""

    passed: int
    judged: int  # those that the reward gave no number are not among them

    @property
    def rate(self) -> float | None:
        """Share that passed; None where nothing was judged."""
        return self.passed / self.judged if self.judged else None


@dataclass(frozen=True, slots=True)
class Measurement:
    """How pass rates are measured.

    Attributes:
        samples: completions per prompt.
        params: what they are drawn with.
        seed: of the noise: completion g of row p draws the stream `(seed, 0, p, g)`, whatever is in its batch.
        batch_size: completions drawn at a time; changes speed and memory, not results.
    """

    samples: int
    params: SamplingParams
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed!r} must be in 0..2^64-1: it is part of the key of the random numbers")


def measure_pass_rates(
    policy: LoadedPolicy,
    rows: Dataset,
    how: Measurement,
    *,
    reward: Callable[..., Any],
    partial: Path,
    limits: Limits | None = None,
    progress: bool = True,
) -> Dataset:
    """The rows with columns `pass_rate`, `pass_count` and `samples`; older ones of these names are replaced.

    Args:
        policy: Draws the completions, with its adapter if it has one.
        rows: With a `prompt`, and what the reward needs.
        how: How it is measured.
        reward: A completion passes where it gives at least 1.0. Runs behind the firewall.
        partial: Where rows that are done are kept; what is there of this measurement already is not drawn again.
        limits: What the reward may take.
        progress: Whether to show progress, on stderr.

    Raises:
        ValueError: no rows, a prompt that does not fit the model, or a `partial` of another measurement.
        RewardError: the reward failed on more than half of a batch.
    """
    encoder = PromptEncoder(policy.tokenizer)
    origins = [f"row {number}: the prompt" for number in range(len(rows))]
    model = base_model_of(policy.model)
    encoded = encode_prompts(rows["prompt"][:], encoder, model, how.params.max_new_tokens, origins)
    scorer = RewardScorer(reward, limits=limits)
    what = {
        "model": policy.base,
        "adapter": policy.adapter,
        "weights_hash": weights_hash(policy.model),
        "rows": len(rows),
        "rows_hash": rows_hash(rows, encoded),
        "reward": scorer.names[0],
        "samples": how.samples,
        "seed": how.seed,
        **asdict(how.params),
    }
    file = PartialFile(partial, what, "a measurement of pass rates")
    done = {number: Counted(passed, judged) for number, passed, judged in file.done}
    try:
        left = [number for number in range(len(rows)) if number not in done]
        sampler = group_sampler(policy.model, policy.tokenizer, how.params)
        size = max(1, how.batch_size // how.samples)
        with _progress_bar(progress) as bar:
            task = bar.add_task("sampling", total=len(rows), completed=len(rows) - len(left))
            for start in range(0, len(left), size):
                some = left[start : start + size]
                counts = _count(sampler, scorer, encoder, rows, encoded, some, how)
                file.add([number, count.passed, count.judged] for number, count in zip(some, counts, strict=True))
                done |= dict(zip(some, counts, strict=True))
                bar.advance(task, len(some))
    finally:
        scorer.close()
    counts = [done[number] for number in range(len(rows))]
    rows = rows.remove_columns([name for name in COLUMNS if name in rows.column_names])
    values = {
        "pass_rate": ([count.rate for count in counts], "float64"),
        "pass_count": ([count.passed for count in counts], "int64"),
        "samples": ([count.judged for count in counts], "int64"),
    }
    for name, (column, kind) in values.items():
        rows = rows.add_column(name, column, feature=Value(kind))
    return rows


def _count(
    sampler: GroupSampler,
    scorer: RewardScorer,
    encoder: PromptEncoder,
    rows: Dataset,
    encoded: Sequence[EncodedPrompt],
    some: Sequence[int],
    how: Measurement,
) -> list[Counted]:
    """Draw and judge the completions of these rows."""
    ids = [encoded[number].ids for number in some]
    drawn = sampler.generate(ids, how.samples, seed=how.seed, prompt_indices=some)
    repeated = [row for row in rows.select(some).to_list() for _ in range(how.samples)]
    prompts = [row["prompt"] for row in repeated]
    prefills = [encoded[number].prefill for number in some for _ in range(how.samples)]
    names = sorted(set(rows.column_names) - {"prompt", "completion", "completion_ids"})
    scores = scorer.score(
        prompts,
        encoder.completions(prompts, prefills, drawn.completion_ids),
        drawn.completion_ids,
        {name: [row[name] for row in repeated] for name in names},
        step=0,
        prefills=prefills,
    )
    scorer.pop_logged()
    rewards = scores.rewards[:, 0].view(len(some), how.samples)
    passed, judged = (rewards >= PASS).sum(dim=1).tolist(), (~rewards.isnan()).sum(dim=1).tolist()
    return [Counted(*both) for both in zip(passed, judged, strict=True)]


def in_band(rows: Dataset, low: float, high: float) -> Dataset:
    """Rows whose pass rate is in `[low, high]`; those of which nothing was judged are not."""
    rates = rows["pass_rate"][:]
    return rows.select([i for i, rate in enumerate(rates) if rate is not None and low <= rate <= high])


def write(rows: Dataset, path: Path) -> None:
    """As JSON Lines or Parquet, by the file's ending; complete or not at all.

    Raises:
        ValueError: for another ending.
    """
    if path.suffix not in WRITERS:
        raise ValueError(f"{str(path)!r} must end in {' or '.join(WRITERS)}: it says how rows are written")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    WRITERS[path.suffix](rows, unfinished)
    os.replace(unfinished, path)


def histogram(rates: Sequence[float | None], bins: int = 10) -> list[tuple[str, int]]:
    """Labels and counts: prompts never solved, those in between in `bins` of equal width, and those always solved."""
    counts = [0] * bins
    known = [rate for rate in rates if rate is not None]
    for rate in known:
        if 0 < rate < 1:
            counts[min(bins - 1, math.floor(rate * bins + 1e-9))] += 1
    labels = [f"{100 * i / bins:.0f} - {100 * (i + 1) / bins:.0f} %" for i in range(bins)]
    never, always = sum(rate == 0 for rate in known), sum(rate == 1 for rate in known)
    shown = [("never", never), *zip(labels, counts, strict=True), ("always", always)]
    return shown + [("not judged", len(rates) - len(known))] * (len(known) < len(rates))


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
