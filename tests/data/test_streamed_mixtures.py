"""Streams of several sources: what is left out is counted; a source that is read again is no duplicate of itself."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from trl_grpo_ext import PromptReport, load_prompts
from trl_grpo_ext.data.screens import SeenBefore

Write = Callable[..., str]


@pytest.fixture
def files(write: Write) -> tuple[str, str]:
    """40 rows; and 7, of which one cannot be read, one is a row of the first file, and one is contaminated."""
    first = write("first.jsonl", [{"problem": f"first {n}", "answer": "1"} for n in range(40)])
    rows: list[Any] = [{"problem": f"second {n}", "answer": "2"} for n in range(5)]
    rows[2]["problem"] = "held out"
    return first, write(
        "second.jsonl", [*rows, {"problem": "q", "answer": None}, {"problem": "first 3", "answer": "1"}]
    )


@pytest.mark.parametrize("mixture", [False, True])
def test_every_row_is_accounted_for(mixture: bool, files: tuple[str, str], write: Write) -> None:
    held_out = write("held_out.jsonl", [{"problem": "held out", "answer": "1"}])
    source: Any = {name: 1.0 for name in files} if mixture else list(files)
    stopping = "all_exhausted_without_replacement"
    arguments: dict[str, Any] = {"unreadable": "drop", "decontaminate": [held_out], "stopping_strategy": stopping}
    report = PromptReport(examples=None)
    stream = load_prompts(source, streaming=True, report=report, **arguments)
    for _ in range(2):  # the counts are of one pass, not of both
        assert len(list(stream)) == 44
        counts = [report.of(name) for name in files]
        assert [c.read for c in counts] == [40, 7] and sum(c.kept for c in counts) == 44
        assert counts[1].dropped["unreadable"] == counts[1].dropped["contaminated"] == 1
        assert report.dropped["duplicates"] == 1  # of whichever came second
        assert [example.row for example in counts[1].examples["unreadable"]] == [5]


def test_source_that_is_read_again_is_no_duplicate_of_itself(files: tuple[str, str]) -> None:
    arguments: dict[str, Any] = {"unreadable": "drop", "stopping_strategy": "all_exhausted", "seed": 1}
    report = PromptReport()
    stream = load_prompts({files[0]: 0.5, files[1]: 0.5}, streaming=True, report=report, **arguments)
    rows = Counter(row["problem"] for row in stream)
    # until the 40 rows are used up, about 40 are drawn of the other file's 6, among them "first 3", which stays out or
    # takes the place of the first file's
    assert len(rows) == 40 + 5 and min(rows[f"second {n}"] for n in (0, 1, 3, 4)) >= 3
    assert report.of(files[1]).kept > 20 and report.read == 47
    once = load_prompts({name: 0.5 for name in files}, streaming=True, **{**arguments, "deduplicate": "off"})
    assert len(list(once)) - sum(rows.values()) == report.dropped["duplicates"]


def test_filter_of_places() -> None:
    seen = SeenBefore(again=True)

    def batch(*rows: tuple[int, str, int]) -> dict[str, list[Any]]:
        return dict(zip(("_key", "source", "_row"), map(list, zip(*rows, strict=True)), strict=True))

    # the second row of `a` is a duplicate of its first; both are read again in the same batch, and in the next one
    verdicts = [bool(why) for why in seen(batch((5, "a", 0), (5, "a", 1), (5, "a", 0), (5, "a", 1), (7, "a", 2)))]
    assert verdicts == [False, True, False, True, False]
    assert [bool(why) for why in seen(batch((5, "a", 0), (5, "a", 1), (5, "b", 0), (8, "b", 0)))] == [0, 1, 1, 0]


def test_stream_is_sent_to_workers_without_its_filter(files: tuple[str, str]) -> None:
    stream = load_prompts(files[0], streaming=True)
    sent = pickle.dumps(stream)
    assert len(sent) < 2**20 and list(pickle.loads(sent)) == list(stream)
