r"""The accuracy reward against the labels of real completions and of pairs of answers, and against math-verify.

Rows with a `caution` are left out. What math-verify reaches is the better of what it reaches on the texts as they are
and with delimiters put around bare answers, file by file, and comes from `python benchmarks/rewards.py`.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.rewards import accuracy_reward

DATA = Path(os.environ.get("TRL_GRPO_EXT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
# File: rows, right according to math-verify 0.9 (the better of both readings)
MATH_VERIFY = {
    "equivalence/math_verify.jsonl": (194, 193),
    "equivalence/lighteval.jsonl": (20, 15),
    "equivalence/hardverify_math.jsonl": (440, 354),
    "equivalence/hendrycks_is_equiv.jsonl": (10, 9),
    "equivalence/nemo_math_equal.jsonl": (24, 23),
    "completions_gsm8k_openai/solutions.jsonl.gz": (5236, 5236),
    "completions_qwen25math/math_cot_100.jsonl.gz": (759, 759),
    "completions_nemo_skills/output_rs.jsonl": (138, 130),
    "processbench/gsm8k.jsonl": (380, 374),
    "processbench/math.jsonl.gz": (960, 942),
}
WRONG_BUT_PAID = 20  # of the 8,161 rows; a reward that is too generous is worse than one that is too strict


def read_rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def judged(name: str) -> list[tuple[bool, bool]]:
    """The label and our verdict of each row that is not doubtful."""
    rows = [row for row in read_rows(name) if not row.get("caution")]
    texts = [row.get("pred") or row.get("completion") or "\n\n".join(row.get("steps", [])) for row in rows]
    label = next(key for key in ("expected", "correct", "final_answer_correct") if key in rows[0])
    rewards = accuracy_reward(texts, solution=[row["gold"] for row in rows])
    return [(bool(row[label]), reward == 1.0) for row, reward in zip(rows, rewards, strict=True)]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[tuple[bool, bool]]]:
    return {name: judged(name) for name in MATH_VERIFY}


@pytest.mark.parametrize("name", MATH_VERIFY)
def test_agrees_with_the_labels_at_least_as_often_as_math_verify(
    name: str, verdicts: dict[str, list[tuple[bool, bool]]]
) -> None:
    rows, theirs = MATH_VERIFY[name]
    assert len(verdicts[name]) == rows
    assert sum(label == ours for label, ours in verdicts[name]) >= theirs


def test_agrees_more_often_over_all(verdicts: dict[str, list[tuple[bool, bool]]]) -> None:
    pairs = [pair for of_file in verdicts.values() for pair in of_file]
    agreed = sum(label == ours for label, ours in pairs)
    assert agreed > sum(theirs for _, theirs in MATH_VERIFY.values())
    assert sum(ours and not label for label, ours in pairs) <= WRONG_BUT_PAID


@pytest.mark.parametrize(("name", "rows"), [("gsm8k/train.jsonl.gz", 7_473), ("gsm8k/test.jsonl", 1_319)])
def test_gsm8k_solutions_earn_full_reward(name: str, rows: int) -> None:
    solutions = [row["answer"] for row in read_rows(name)]
    assert len(solutions) == rows
    assert accuracy_reward(solutions, answer=solutions) == [1.0] * rows


def test_math_solutions_agree_with_their_answers() -> None:
    rows = read_rows("math/math500.jsonl")
    completions = [row["solution"] for row in rows]
    assert accuracy_reward(completions, solution=completions) == [1.0] * len(rows)
    assert accuracy_reward(completions, answer=[row["answer"] for row in rows]) == [1.0] * len(rows)


def test_another_row_s_answer_earns_nothing() -> None:
    """Each of MATH-500's answers against the next one: equal for a few, written differently for one (5 and x=5)."""
    answers = [row["answer"] for row in read_rows("math/math500.jsonl")]
    others = [*answers[1:], answers[0]]
    rewards = accuracy_reward([rf"\boxed{{{other}}}" for other in others], answer=answers)
    equal = [float(answer == other.removeprefix("x=")) for answer, other in zip(answers, others, strict=True)]
    assert rewards == equal
