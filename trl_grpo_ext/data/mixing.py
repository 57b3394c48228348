"""Several sources as one: without duplicates, interleaved by weight, shuffled and cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from .plan import Choice, SourcePlan
from .report import MAX_SHOWN, DroppedPrompt, PromptReport
from .rows import INTERNAL
from .screens import SeenBefore, first_of_each
from .steps import STREAM_BATCH, Batch, apply_screen


def mix(
    prepared: list[Any],
    sources: Sequence[SourcePlan],
    deduplicate: str,
    stopping_strategy: str,
    seed: int,
    report: PromptReport,
) -> Any:
    """One data set. Duplicates are looked for across the sources: the first one, in the order of the sources (in a
    stream: in the order of reading), stays.

    Raises:
        ValueError: a source has nothing left.
    """
    streaming = isinstance(prepared[0], IterableDataset)
    if deduplicate != "off" and not streaming:
        prepared = without_duplicates(prepared, report)
    for rows, plan in zip(prepared, sources, strict=True):
        if not streaming and len(rows) == 0:
            raise _nothing_left(plan.name, report)
    weights = [plan.weight for plan in sources if plan.weight is not None]
    if len(prepared) == 1:
        mixed = prepared[0]
    elif not weights:
        mixed = concatenate_datasets(prepared)
    else:
        shares = [weight / sum(weights) for weight in weights]
        mixed = interleave_datasets(prepared, shares, seed=seed, stopping_strategy=stopping_strategy)
    if deduplicate != "off" and streaming:
        again = bool(weights) and stopping_strategy == "all_exhausted"
        mixed = apply_screen(mixed, SeenBefore(again), report)
    return mixed


def finish(mixed: Any, whole: Choice, report: PromptReport) -> Dataset | IterableDataset:
    """The chosen rows, counted, without the columns that only this folder needs.

    Raises:
        ValueError: nothing is left.
    """
    rows = whole.of(mixed)
    if isinstance(rows, IterableDataset):
        features = rows.features.copy()
        for name in INTERNAL:
            features.pop(name)
        rows = rows.map(
            _Count(report),
            batched=True,
            batch_size=STREAM_BATCH,
            with_indices=True,
            remove_columns=list(INTERNAL),
            features=features,
        )
        if next(iter(rows), None) is None:
            raise _nothing_left(" + ".join(report.sources), report)
        return rows
    names = rows.select_columns("source").with_format("arrow")[:]["source"]
    kept = {entry["values"]: entry["counts"] for entry in pc.value_counts(names).to_pylist()}
    for name, counts in report.sources.items():
        counts.kept = kept.get(name, 0)
        counts.unused = max(0, counts.read - sum(counts.dropped.values()) - counts.kept)
    if len(rows) == 0:
        raise _nothing_left(" + ".join(report.sources), report)
    return rows.remove_columns(list(INTERNAL))


def without_duplicates(prepared: Sequence[Dataset], report: PromptReport) -> list[Dataset]:
    """The data sets, without rows whose key an earlier row of any of them has."""
    keys = [
        np.asarray(rows.select_columns("_key").with_format("numpy")[:]["_key"], dtype=np.int64) for rows in prepared
    ]
    first = first_of_each(np.concatenate(keys))
    starts = np.cumsum([0, *map(len, keys)])
    unique = []
    for number, rows in enumerate(prepared):
        own = first[starts[number] : starts[number + 1]]
        is_first = own == np.arange(starts[number], starts[number + 1])
        if not is_first.all():

            def describe(index: int, rows: Dataset = rows, own: Any = own) -> DroppedPrompt:
                owner = int(np.searchsorted(starts, own[index], side="right")) - 1
                original = prepared[owner][int(own[index] - starts[owner])]
                why = f"the same as row {original['_row']} of {original['source']}"
                if original["solution"] != (other := rows[index]["solution"]):
                    why += f", where the answer is {original['solution'][:40]!r} and not {other[:40]!r}"
                return DroppedPrompt(rows[index]["_row"], rows[index]["problem"][:MAX_SHOWN], why)

            report.drop_all(rows[0]["source"], SeenBefore.rule, np.flatnonzero(~is_first).tolist(), describe)
        unique.append(rows if is_first.all() else rows.select(np.flatnonzero(is_first)))
    return unique


class _Count:
    """Counts the rows that a stream hands out."""

    def __init__(self, report: PromptReport) -> None:
        self.report = report

    def __deepcopy__(self, memo: Any) -> _Count:
        """A stream may be copied, to be mixed; the report is the one that was asked for."""
        return _Count(self.report)

    def __call__(self, batch: Batch, indices: list[int]) -> dict[str, list[Any]]:
        if indices and indices[0] == 0:
            for counts in self.report.sources.values():
                counts.kept = 0
        for source, count in Counter(batch["source"]).items():
            self.report.of(source).kept += count
        return {name: values for name, values in batch.items() if name not in INTERNAL}


def _nothing_left(name: str, report: PromptReport) -> ValueError:
    return ValueError(
        f"source={name!r}: no prompt is left. Loosen the filters, or check split, skip and take. What became of the "
        f"rows:\n{report}"
    )
