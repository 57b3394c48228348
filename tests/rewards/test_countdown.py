"""The countdown reward: each number once, the target hit, and nothing but arithmetic."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from fractions import Fraction

import pytest

from trl_grpo_ext.rewards import CountdownReward, countdown_reward
from trl_grpo_ext.rewards.countdown import MAX_EQUATION_CHARS, evaluate
from trl_grpo_ext.rewards.marks import is_row_wise


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("(19 - 4) * 2 + 7", 1.0),  # 15 * 2 + 7 = 37
        ("(19 - 4) * 2 + 7 = 37", 1.0),
        ("7 + 2 * (19 - 4)", 1.0),
        (r"(19 - 4) \times 2 + 7", 1.0),
        ("(19 − 4) × 2 + 7", 1.0),
        ("(19 - 4) * 2 + 7 = 38", 0.0),  # claims what is not so
        ("19 + 7 + 4 * 2", 0.0),  # 34
        ("37", 0.0),  # not one of the numbers
        ("(19 - 4) * 2 + 7 + 0", 0.0),  # one number too many
        ("19 * 2 - 7 + 4 + 2", 0.0),  # 37, but 2 is there once
        ("19 * 2 - 1", 0.0),  # 37, but of other numbers
        ("The answer is (19 - 4) * 2 + 7", 0.0),  # the equation must be all there is
        ("19 ** 2", 0.0),
        ("__import__('os')", 0.0),
        (r"\boxed{(19 - 4) * 2 + 7}", 1.0),
        (r"$\boxed{(19 - 4) \times 2 + 7}$", 1.0),
        (r"so \boxed{(19 - 4) * 2 + 7}", 0.0),  # the equation must be all there is
        ("", 0.0),
    ],
)
def test_reward(answer: str, reward: float) -> None:
    assert countdown_reward([f"<think>hm</think><answer>{answer}</answer>"], target=[37], nums=[[19, 4, 2, 7]]) == [
        reward
    ]


def test_where_it_is_looked_for() -> None:
    texts = ["<answer>1 + 2</answer>", r"\boxed{1 + 2}", "<think><answer>1 + 2</answer></think>"]
    given = {"target": [3] * 3, "numbers": [[1, 2]] * 3}
    assert countdown_reward(texts, **given) == [1.0, 0.0, 0.0]
    assert CountdownReward(extract_from=["boxed"])(texts, **given) == [0.0, 1.0, 0.0]
    assert CountdownReward(extract_from=["answer_tag", "boxed"])(texts, **given) == [1.0, 1.0, 0.0]


def test_numbers_may_be_left_out_by_option() -> None:
    texts = ["<answer>1 + 2</answer>", "<answer>1 + 2 + 2</answer>", "<answer>3</answer>"]
    reward = CountdownReward(use_all=False)
    assert reward(texts, target=[3, 5, 3], nums=[[1, 2, 9]] * 3) == [1.0, 0.0, 0.0]
    assert countdown_reward(texts, target=[3, 5, 3], nums=[[1, 2, 9]] * 3) == [0.0] * 3


def test_numbers_given_twice_conversational_and_missing_rows() -> None:
    completions = [[{"role": "assistant", "content": "<answer>5 * 5 - 1</answer>"}]] * 3
    rewards = countdown_reward(completions, target=[24, None, 24], nums=[[5, 1, 5], [5, 1, 5], None])
    assert rewards == [1.0, None, None]


@pytest.mark.parametrize(
    ("equation", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("8 / 4 / 2", 1),
        ("8 - 4 - 2", 2),
        ("-3 + 5", 2),
        ("2 * -3", -6),
        ("-(1 + 2)", -3),
        ("1 / 3", Fraction(1, 3)),
        ("1.5 * 2", 3),
        (r"\frac{6}{4} \cdot 2 \div 3", 1),
        ("2 * 3 = 6", 6),
    ],
)
def test_value(equation: str, value: Fraction) -> None:
    result = evaluate(equation)
    assert result is not None
    assert result[0] == value


def test_numbers_used() -> None:
    result = evaluate("(5 + 5) / -2 = -5")
    assert result == (Fraction(-5), Counter({Fraction(5): 2, Fraction(2): 1}))


@pytest.mark.parametrize(
    "equation",
    ["", "()", "1 +", "* 2", "1 2", "2(3)", "(1", "1)", "1 / 0", "1 / (2 - 2)", "2 ^ 3", "2 ** 3", "1 = 2", "1 = 1 = 1",
     "1 =", "x + 1", "1e9", "9" * 19, "+1", "1 + + 2", "5!", "1" + "+1" * MAX_EQUATION_CHARS],
)  # fmt: skip
def test_not_arithmetic(equation: str) -> None:
    assert evaluate(equation) is None


@pytest.mark.parametrize("unit", ["(", ")", "-", "1+", "9*", "1/", "=", "1/3+", r"\frac{", "9" * 18 + "*"])
def test_hostile_equations_take_no_time(unit: str) -> None:
    started = time.perf_counter()
    evaluate(unit * (MAX_EQUATION_CHARS // len(unit)))
    countdown_reward([f"<answer>{unit * 50_000}</answer>"], target=[1], nums=[[1]])
    assert time.perf_counter() - started < 5


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"needs the columns `target` and one of \('nums', 'numbers'\), got \['nums'\]"
    ):
        countdown_reward(["1"], nums=[[1]])
    with pytest.raises(ValueError, match="`target` has 2 values for 1 completions"):
        countdown_reward(["1"], target=[1, 2], nums=[[1]])
    with pytest.raises(ValueError, match="`nums` holds 'one', which is no number"):
        countdown_reward(["1"], target=[1], nums=[["one"]])
    with pytest.raises(ValueError, match=r"`extract_from` is \['box'\]"):
        CountdownReward(extract_from=["box"])


def test_is_picklable_and_marked() -> None:
    reward = pickle.loads(pickle.dumps(CountdownReward(use_all=False)))
    assert reward(["<answer>3</answer>"], target=[3], nums=[[1, 3]]) == [1.0]
    assert reward.__name__ == countdown_reward.__name__ == "countdown_reward"
    assert is_row_wise(reward) and is_row_wise(countdown_reward)
