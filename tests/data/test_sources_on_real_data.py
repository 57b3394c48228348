r"""The real sets through `load_prompts`: every gold parses, worked solutions earn 1.0, no duplicates, no contamination.

`benchmarks/prompts.py --gold` prints the figures.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_grpo_ext import PromptReport, accuracy_reward, load_prompts
from trl_grpo_ext.data.screens import normalized

DATA = Path(os.environ.get("TRL_GRPO_EXT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
# File: name of its source, rows, and the columns its rows have
SETS = {
    "gsm8k/train.jsonl.gz": ("gsm8k", 7473, set()),
    "gsm8k/test.jsonl": ("gsm8k", 1319, set()),
    "math/math500.jsonl": ("math-500", 500, {"level", "subject"}),
    "math/test.jsonl.gz": ("math", 5000, {"level", "subject"}),
    "svamp/svamp.jsonl": ("svamp", 1000, {"subject"}),
    "aime/aime2024.jsonl": ("aime", 30, set()),
    "aime/aime_1983_2023.jsonl.gz": ("aime", 975, set()),
    "mgsm/mgsm.jsonl.gz": ("mgsm", 2750, {"language"}),
}
# Column of the worked solution, and rows whose solution does not state the gold answer as its only one
WORKED: dict[str, tuple[str, dict[int, str]]] = {
    "gsm8k/train.jsonl.gz": ("answer", {}),
    "gsm8k/test.jsonl": ("answer", {}),
    "math/math500.jsonl": ("solution", {}),
    "math/test.jsonl.gz": (
        "solution",
        {
            414: "two boxes: -2 and 1, the gold (the last one) is 1",
            2549: "two boxes: -3/2 and -3/4, the gold is -3/4",
            2703: "two boxes: 3 or 2/5, the gold is 2/5",
            2716: "two boxes: two foci, either of which is right",
            2912: "two boxes: two points, either of which is right",
            4559: "two boxes: -1 and 2, the gold is 2",
            4860: "two boxes: pi/4 and 5 pi/4, the gold is 5 pi/4",
        },
    ),
    "aime/aime2024.jsonl": ("solution", {}),
    "aime/aime_1983_2023.jsonl.gz": (
        "solution",
        {
            957: "the solution's text is a copyright notice",
            965: "the solution ends in 17/18; the gold is its m + n = 35",
        },
    ),
}
# Rows of MATH test that are not in MATH-500 and share half of the 13-grams of one of its problems: the same exercise
# with other numbers, or another question about the same figure
NEAR = {
    538: "y-intercepts of x = -y^2 + 4y - 4: another parabola",
    652: "the same reflected parabola; a+b+c+d+e+f is asked for",
    1421: "the same 6 books; the maths books at both ends",
    1667: "the same four circles in a triangle; another question",
    2022: "the same triangle and centroid; the area of another triangle",
    2679: "factors of x^12 - 1 over the integers: another polynomial",
    3357: "0.1(23) as a fraction: another decimal",
    3454: "last nonzero digit of 141/400: another fraction",
    3633: "a number from 1 to 100: a divisor of 50",
    3666: "exponent of 3 in 109!, with the same reminder of what n! is",
    3928: "primes in 20!, with the same reminder",
    4098: "largest prime factor of 97!, with the same reminder",
    4429: "a number from 1 to 100: a perfect square",
    4530: "the same right triangle with sin A = 2 cos A; cos A is asked for",
    4810: "plane through a line and a point: the same form of the answer is asked for",
    4883: "cross products of three vectors: other vectors",
    4962: "(-4, 0) in polar coordinates: another point",
}


def source_of(file: str) -> str:
    path = DATA / file
    if not path.exists():
        pytest.skip(f"{file} is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    return f"{SETS[file][0]}:{path}"


def raw_rows(file: str) -> list[dict[str, Any]]:
    path = DATA / file
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Dataset, PromptReport]]:
    """Each set, loaded once."""
    found = {}
    for file in SETS:
        if (DATA / file).exists():
            report = PromptReport(examples=None)
            found[file] = (load_prompts(source_of(file), report=report), report)
    return found


@pytest.mark.parametrize("file", SETS)
def test_every_gold_parses_and_no_row_is_left_out(file: str, loaded: dict[str, tuple[Dataset, PromptReport]]) -> None:
    source = source_of(file)
    dataset, report = loaded[file]
    _, rows, columns = SETS[file]
    assert len(dataset) == rows == report.read == report.kept
    assert set(dataset.column_names) == {"problem", "prompt", "solution", "source"} | columns
    assert all(dataset["solution"]) and set(dataset["source"]) == {source}
    assert [message["role"] for message in dataset[0]["prompt"]] == ["system", "user"]


@pytest.mark.parametrize("file", SETS)
def test_no_duplicates_are_left(file: str, loaded: dict[str, tuple[Dataset, PromptReport]]) -> None:
    source_of(file)
    problems = loaded[file][0]["problem"][:]
    assert len({normalized(problem) for problem in problems}) == len(problems)


@pytest.mark.parametrize("file", WORKED)
def test_worked_solutions_earn_the_accuracy_reward(file: str, loaded: dict[str, tuple[Dataset, PromptReport]]) -> None:
    source_of(file)
    column, others = WORKED[file]
    worked = [row[column] for row in raw_rows(file)]
    rewards = accuracy_reward(worked, solution=loaded[file][0]["solution"][:])
    assert {row for row, reward in enumerate(rewards) if reward != 1.0} == set(others)
    assert len(others) <= 0.01 * len(worked)


def test_math_test_against_math_500(loaded: dict[str, tuple[Dataset, PromptReport]]) -> None:
    source, against = source_of("math/test.jsonl.gz"), source_of("math/math500.jsonl")
    flagged = {index for index, row in enumerate(raw_rows("math/test.jsonl.gz")) if row["in_math500"]}
    report = PromptReport(examples=None)
    clean = load_prompts(source, decontaminate=[against], report=report)
    dropped = {example.row: example.why for example in report.of(source).examples["contaminated"]}
    assert len(flagged) == 500 and flagged <= set(dropped)
    assert set(dropped) - flagged == set(NEAR)
    assert len(clean) == 5000 - 500 - len(NEAR) == report.kept
    assert all("the same as row" in dropped[row] for row in flagged)
    assert dropped[4530].startswith("shares 6 of 8 13-grams with row 45 of math-500")


def test_a_language_of_mgsm() -> None:
    german = load_prompts(source_of("mgsm/mgsm.jsonl.gz"), config="de")
    assert len(german) == 250 and set(german["language"]) == {"de"}


def test_broken_rows_of_a_real_file_are_refused_or_counted() -> None:
    path = DATA / "math" / "train_answers.jsonl.gz"
    if not path.exists():
        pytest.skip("math/train_answers.jsonl.gz is not there")
    source, report = f"math:{path}", PromptReport(examples=None)
    with pytest.raises(
        ValueError, match=r"row 886: 'answer' must be text or a number, it is 'None'.*unreadable='drop'"
    ):
        load_prompts(source)
    load_prompts(source, unreadable="drop", report=report)
    assert {example.row for example in report.of(source).examples["unreadable"]} == {886, 1009, 5328, 5330}
    assert report.dropped == {"unreadable": 4, "duplicates": 4} and report.kept == 7474 - 8
