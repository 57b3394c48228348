r"""The accuracy reward: gold columns, equality in three stages, and answers made to hang it."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.rewards import accuracy_reward
from trl_grpo_ext.rewards.accuracy import answers_match
from trl_grpo_ext.rewards.symbolic import is_hostile

DATA = Path(os.environ.get("TRL_GRPO_EXT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def read_rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("gold", "prediction", "match"),
    [
        ("Evelyn", r"\text{evelyn}", True),  # words: their case does not count
        ("(B)", "B", True),
        (r"10!\text{ ways}", r"10! \text{ways}", True),  # as text, although never evaluated
        ("1/2", "0.5", True),
        ("42", "42.000", True),
        ("42", "24", False),
        ("1 1/2", "11/2", False),  # white space is not simply dropped
        ("x^2+2x+1", "(x+1)^2", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("5", "x=5", True),
        (r"\frac{1}{3}", "0.333333333", True),  # rounded to more than the six digits that math-verify compares
        ("(0, 1)", "[0, 1]", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("1000000", "1000001", False),
        ("4k+3", "those congruent to 3 modulo 4", False),
        ("4", "we are left with just 4 of them here", True),
        (r"7!", r"5040", True),
    ],
)
def test_answers_match(gold: str, prediction: str, match: bool) -> None:
    assert answers_match(gold, prediction) is match


def test_standard_and_conversational_completions() -> None:
    standard = ["<think>6 * 7</think><answer>42</answer>", r"so \boxed{41}"]
    conversational = [[{"role": "assistant", "content": text}] for text in standard]
    assert accuracy_reward(standard, solution=["42", "42"]) == [1.0, 0.0]
    assert accuracy_reward(conversational, answer=["#### 42", "#### 42"], prompts=[], completion_ids=[]) == [1.0, 0.0]


def test_solution_comes_before_answer_and_answer_fills_its_gaps() -> None:
    rewards = accuracy_reward(["1", "1", "1", "1"], solution=["1", "2", None, ""], answer=["2", "1", "1", ""])
    assert rewards == [1.0, 0.0, 1.0, None]


def test_gold_that_cannot_be_read_is_left_out_and_numbers_are_read() -> None:
    golds = [None, r"\boxed{3", float("nan"), 3, 3.0, 3]
    rewards = accuracy_reward(["3", "3", "3", "3", "3", "none"], answer=golds)
    assert rewards == [None, None, None, 1.0, 1.0, 0.0]


def test_no_gold_column_names_both() -> None:
    with pytest.raises(ValueError, match=r"`solution` nor an `answer`"):
        accuracy_reward(["1"])


def test_wrong_length_and_wrong_type() -> None:
    with pytest.raises(ValueError, match="`answer` has 1 values for 2 completions"):
        accuracy_reward(["1", "2"], answer=["1"])
    with pytest.raises(TypeError, match="gold answer must be text or a number, got list"):
        accuracy_reward(["1"], answer=[["1"]])


HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "plain tower": "9^9^9^9",
    "python tower": "9**9**9**9",
    "factorial": "99999999!",
    "factorial of a factorial": "9!!!!",
    "power": "10^{100000000}",
    "power of powers": r"((9999^{99})^{99})^{99}",
    "braces": "{" * 5_000,
    "boxes": r"\boxed{" * 5_000,
    "digits": "1" * 100_000,
    "exponent": "1e999999999",
    "expansion": "(a+b+c+d+e+f)^{32}",
    "polynomial": r"\frac{x^{9999}-1}{x-1}",
    "product": r"\prod_{k=1}^{1000000} k",
    "binomial": r"\binom{1000000000}{500000000}",
    "exp": r"\exp(10^{9999})",
    "flat functions": r"\sin(x)\cos(2x)\tan(3x)\sin(4x)\cos(5x)\tan(6x)\sin(7x)",
    "functions": r"\sin(\cos(\tan(" * 4 + "x" + ")))" * 4,
}
# Those that math-verify itself takes for ever or for long over, so that only the guard can stop them in a thread.
MUST_BE_REFUSED = ["tower", "plain tower", "python tower", "factorial", "power", "power of powers", "expansion",
                   "polynomial", "product", "binomial", "exp",
                   "functions", "flat functions"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("in_thread", [False, True], ids=["main", "thread"])
def test_hostile_answer_costs_little_and_earns_nothing(name: str, in_thread: bool) -> None:
    text = HOSTILE[name]
    completions = [text, f"<answer>{text}</answer>", rf"\boxed{{{text}}}", f"The answer is ${text}$"]
    rewards: list[float | None] = []

    def score() -> None:
        rewards.extend(accuracy_reward(completions, solution=["x^2 + 1"] * 4))
        accuracy_reward([r"\boxed{7}"], solution=[text])  # and as gold

    started = time.perf_counter()
    if in_thread:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()
    else:
        score()
    assert rewards == [0.0] * 4
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize("name", MUST_BE_REFUSED)
def test_hostile_answer_is_refused_before_parsing(name: str) -> None:
    assert is_hostile(HOSTILE[name])


@pytest.mark.parametrize(
    "text",
    ["2^{2024}", "x^{100} + 1", r"(x+1)^{10}", r"(a-b)^2(b-c)^2(c-a)^2", r"\frac{7!}{16}", r"\sqrt{a^2b^2 + c^2}",
     "e^{-x}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", r"\cos^2 x", "x \\neq 3", "5!"],
)  # fmt: skip
def test_real_answers_are_not_refused(text: str) -> None:
    assert not is_hostile(text)


def test_symbolic_stage_works_outside_the_main_thread() -> None:
    rewards: list[float | None] = []
    thread = threading.Thread(target=lambda: rewards.extend(accuracy_reward([r"\boxed{(x+1)^2}"], ["x^2+2x+1"])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@pytest.mark.parametrize(("name", "rows"), [("gsm8k/train.jsonl.gz", 7_473), ("gsm8k/test.jsonl", 1_319)])
def test_gsm8k_solutions_earn_full_reward(name: str, rows: int) -> None:
    solutions = [row["answer"] for row in read_rows(name)]
    assert len(solutions) == rows
    assert accuracy_reward(solutions, answer=solutions) == [1.0] * rows


def test_gsm8k_completions_agree_with_their_labels() -> None:
    rows = read_rows("completions_gsm8k_openai/solutions.jsonl.gz")
    rewards = accuracy_reward([row["completion"] for row in rows], solution=[row["gold"] for row in rows])
    assert rewards == [float(row["correct"]) for row in rows]


def test_math_solutions_agree_with_their_answers() -> None:
    rows = read_rows("math/math500.jsonl")
    completions = [row["solution"] for row in rows]
    assert accuracy_reward(completions, solution=completions) == [1.0] * len(rows)
    assert accuracy_reward(completions, answer=[row["answer"] for row in rows]) == [1.0] * len(rows)


def test_math_completions_agree_with_their_labels_but_for_the_known_wrong_one() -> None:
    rows = read_rows("completions_qwen25math/math_cot_100.jsonl.gz")
    rewards = accuracy_reward([row["completion"] for row in rows], solution=[row["gold"] for row in rows])
    differing = [row for row, reward in zip(rows, rewards, strict=True) if reward != float(row["correct"])]
    assert all(row["caution"] for row in differing)  # `10{,}000` labelled different from 10000
    assert len(differing) <= 1
