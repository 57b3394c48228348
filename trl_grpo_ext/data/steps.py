"""Steps over rows, for data sets and streams alike: lazy, cached by fingerprint, and counted.

A step's fingerprint is made of the data's own, this folder's code and the step's key, instead of a pickle of its
function: tokenizers, indexes of n-grams and compiled templates do not pickle to the same bytes twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher

from .code import CODE
from .report import MAX_SHOWN, DroppedPrompt, PromptReport

Batch = Mapping[str, list[Any]]
STREAM_BATCH = 256  # rows that a stream reads ahead


class Screen:
    """A rule that leaves rows out: by `rule` the report names it, and it looks at `columns` alone."""

    rule: str = ""
    columns: tuple[str, ...] = ()

    @property
    def key(self) -> Any:
        """All that its verdicts depend on, beside the rows: for the cache."""
        return None

    def restart(self) -> None:
        """Forget the rows seen so far: a new pass over a stream begins."""

    def __call__(self, batch: Batch) -> list[str]:
        """Of each row why it is left out; "" where it is kept."""
        raise NotImplementedError


def map_rows(
    rows: Dataset | IterableDataset,
    function: Callable[..., Any],
    key: Any,
    features: Features,
    what: str,
    columns: tuple[str, ...] | None = None,
) -> Any:
    """`rows.map` in batches with row numbers, of `columns` only or of all; the result has those of `features`."""
    if columns is not None:
        rows = rows.select_columns(list(columns))
    if isinstance(rows, IterableDataset):
        return rows.map(
            function,
            batched=True,
            batch_size=STREAM_BATCH,
            with_indices=True,
            remove_columns=rows.column_names or list(next(iter(rows), {})),
            features=features,
        )
    return rows.map(
        function,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        desc=what,
        new_fingerprint=Hasher.hash([rows._fingerprint, CODE, what, key, str(features)]),
    )


def apply_screen(rows: Any, screen: Screen, report: PromptReport, source: str | None = None) -> Any:
    """The rows of one source (of a stream: None for all) that a rule keeps; what it leaves out is counted, and a
    stream's as it is read."""
    if isinstance(rows, IterableDataset):
        return rows.map(
            _Sieve(screen, report, source),
            batched=True,
            batch_size=STREAM_BATCH,
            with_indices=True,
            features=rows.features,
        )
    verdicts = map_rows(
        rows,
        lambda batch, _: {"why": screen(batch)},
        screen.key,
        Features({"why": Value("string")}),
        f"screening: {screen.rule}",
        screen.columns,
    )
    why = verdicts.with_format("arrow")[:]["why"]
    dropped = pc.indices_nonzero(pc.not_equal(why, "")).to_pylist()
    if not dropped:
        return rows
    shown = rows.select_columns(["_row", "source", "problem"])

    def describe(index: int) -> DroppedPrompt:
        return DroppedPrompt(shown[index]["_row"], shown[index]["problem"][:MAX_SHOWN], why[index].as_py())

    report.drop_all(shown[0]["source"], screen.rule, dropped, describe)
    return rows.select(pc.indices_nonzero(pc.equal(why, "")).to_numpy().astype(int))


class _Sieve:
    """A screen on a stream's batches."""

    def __init__(self, screen: Screen, report: PromptReport, source: str | None) -> None:
        self.screen, self.report, self.source = screen, report, source

    def __deepcopy__(self, memo: Any) -> _Sieve:
        """Streams are copied to be mixed; what they count goes into the one report that was asked for."""
        return _Sieve(copy.copy(self.screen), self.report, self.source)

    def __call__(self, batch: Batch, indices: list[int]) -> dict[str, list[Any]]:
        if indices and indices[0] == 0:  # a new pass over the stream
            self.screen.restart()
            self.report.forget(self.screen.rule, self.source)
        reasons = self.screen(batch)
        for index, why in enumerate(reasons):
            if why:
                self.report.drop(
                    batch["source"][index], self.screen.rule, batch["_row"][index], batch["problem"][index], why
                )
        kept = [index for index, why in enumerate(reasons) if not why]
        return {name: [values[index] for index in kept] for name, values in batch.items()}
