r"""Rows of the known sets under other names, and what a problem that is written from columns needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from trl_grpo_ext import PromptReport, load_prompts
from trl_grpo_ext.data.screens import normalized

Write = Callable[..., str]


def test_known_set_under_other_column_names_keeps_its_parser(write: Write) -> None:
    file = write("a.jsonl", [{"q": "How many?", "a": "2 + 2 = 4\n#### 4", "b": "4"}])
    columns = {"problem": "q", "answer": "a"}
    assert load_prompts(f"gsm8k:{file}", columns=columns)["solution"][:] == ["4"]  # and not the worked solution
    with pytest.raises(ValueError, match=r"'b' must end in '#### <gold answer>', it is '4'.*answer="):
        load_prompts(f"gsm8k:{file}", columns={**columns, "answer": "b"})


def test_kept_column_under_another_name_is_of_its_kind(write: Write) -> None:
    file = write("a.jsonl", [{"problem": "x?", "solution": r"\boxed{4}", "hardness": "Level 3"}])
    assert load_prompts(f"math:{file}", columns={"level": "hardness"})[0]["level"] == 3


def test_countdown_under_other_names_and_in_own_words(write: Write) -> None:
    file = write("a.jsonl", [{"numbers": [2, 4.0], "goal": 6, "text": "Make six."}])
    columns = {"nums": "numbers", "target": "goal"}
    row = load_prompts(f"countdown:{file}", columns=columns)[0]
    assert row["problem"].startswith("Using the numbers [2, 4], create an equation that equals 6.")
    assert (row["nums"], row["target"], row["solution"]) == ([2, 4], 6, "6")
    row = load_prompts(f"countdown:{file}", columns={**columns, "problem": "text"})[0]
    assert (row["problem"], row["target"]) == ("Make six.", 6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": None, "target": 6}, "row 1: 'nums' is None, and the problem is written from it"),
        ({"nums": [1.5, 4.5], "target": 6}, r"row 1: 'nums' is \[1\.5, 4\.5\], which is no ints"),
        ({"nums": [1, 5], "target": 6.5}, "row 1: 'target' is 6.5, which is no int"),
    ],
)
def test_countdown_that_cannot_be_written(row: dict[str, Any], message: str, write: Write) -> None:
    file, report = write("a.jsonl", [{"nums": [1, 5], "target": 6}, row]), PromptReport()
    with pytest.raises(ValueError, match=message):
        load_prompts(f"countdown:{file}")
    assert len(load_prompts(f"countdown:{file}", unreadable="drop", report=report)) == 1
    assert report.dropped == {"unreadable": 1}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 5² + 1?", "What is 52 + 1?", False),
        ("What is 5² + 1?", "What is 5^2 + 1?", True),
        ("Find log₂8.", "Find log28.", False),
        ("Compute $5!$.", "Compute $5$.", False),
        ("What is ２ + ３？", "What is 2 + 3?", True),
    ],
)
def test_what_is_the_same_problem(one: str, other: str, same: bool) -> None:
    assert (normalized(one) == normalized(other)) is same


def test_class_labels_are_their_names(tmp_path: Path) -> None:
    """MMLU's answers: a number to `datasets`, a letter to everyone else."""
    features = Features({"problem": Value("string"), "answer": ClassLabel(names=["A", "B", "C"])})
    rows = {"problem": ["p", "q", "r"], "answer": [2, 0, None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        prompts = load_prompts(tmp_path / "a.parquet", unreadable="drop", streaming=streaming)
        assert [row["solution"] for row in prompts] == ["C", "A"]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_without_rows(streaming: bool, tmp_path: Path) -> None:
    Dataset.from_dict({"problem": [], "answer": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: it holds no rows"):
        load_prompts(tmp_path / "a.parquet", streaming=streaming)
