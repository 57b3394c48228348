"""The multiple-choice reward: what counts as a choice, and what as a gold one."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from trl_grpo_ext.rewards import MultipleChoiceReward, multiple_choice_reward
from trl_grpo_ext.rewards.marks import is_row_wise

CITIES = ["London", "Paris", "Rome", "Bern"]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<answer>B</answer>", 1.0),
        ("<answer>(b)</answer>", 1.0),
        ("<answer>B. Paris</answer>", 1.0),
        ("<answer>option B</answer>", 1.0),
        ("<answer>C</answer> The answer is B", 0.0),  # the tag comes first
        (r"So \boxed{B}", 1.0),
        (r"So \boxed{\text{(B)}}", 1.0),
        ("#### B", 1.0),
        ("The answer is (B), and not (C).", 0.0),  # names two
        ("The answer is B.", 1.0),
        ("The correct option is B.", 1.0),
        ("Option C is tempting, but option B is correct.", 1.0),
        ("(B) is the right one, as (A) is too small.", 1.0),
        ("Option B is wrong, so C is correct.", 0.0),
        ("A is too small, C too large.\nB", 1.0),
        ("It is (A), no, it must be (B)", 1.0),  # the last in brackets
        ("It is (B), no, it must be (A)", 0.0),
        ("<think>the answer is B</think>", 0.0),
        ("<think>the answer is B</think>The answer is C", 0.0),
        ("<answer>A, B, C, D</answer>", 0.0),  # naming all does not pay
        ("<answer>B or C</answer>", 0.0),
        ("I do not know.", 0.0),
        ("", 0.0),
    ],
)
def test_choice_of_a_letter(completion: str, reward: float) -> None:
    assert multiple_choice_reward([completion], answer=["B"]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<answer>Paris</answer>", 1.0),
        ("The answer is Paris.", 1.0),
        ("<answer>B. Paris</answer>", 1.0),
        ("<answer>Rome</answer>", 0.0),
        ("<answer>E</answer>", 0.0),  # there are four
    ],
)
def test_choice_of_a_text(completion: str, reward: float) -> None:
    assert multiple_choice_reward([completion], answer=["B"], choices=[CITIES]) == [reward]


@pytest.mark.parametrize("gold", ["B", "(B)", "b", 1, r"\boxed{B}", "B. Paris", "Paris"])
def test_gold_forms(gold: Any) -> None:
    completions = ["<answer>B</answer>", "<answer>C</answer>"]
    assert multiple_choice_reward(completions, solution=[gold] * 2, choices=[CITIES] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("gold", ["AC", "A, C", "A and C"])
def test_several_right_options(gold: str) -> None:
    completions = [f"<answer>{choice}</answer>" for choice in ("A and C", "C, A", "A", "A, B, C")]
    assert multiple_choice_reward(completions, answer=[gold] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_conversational_and_rows_without_gold() -> None:
    completions = [[{"role": "assistant", "content": "<answer>B</answer>"}]] * 3
    assert multiple_choice_reward(completions, solution=["B", None, " "]) == [1.0, None, None]


def test_options() -> None:
    reward = MultipleChoiceReward(letters="WXYZ", choices_column="options", first_index=1)
    completions = ["<answer>X</answer>", "<answer>Paris</answer>", "<answer>B</answer>"]
    assert reward(completions, answer=[2, 2, 2], options=[CITIES] * 3) == [1.0, 1.0, 0.0]


def test_errors() -> None:
    with pytest.raises(ValueError, match="neither a `solution` nor an `answer` column"):
        multiple_choice_reward(["B"])
    with pytest.raises(ValueError, match="`answer` has 1 values for 2 completions"):
        multiple_choice_reward(["B", "C"], answer=["B"])
    with pytest.raises(ValueError, match="`choices` has 2 values for 1 completions"):
        multiple_choice_reward(["B"], answer=["B"], choices=[CITIES] * 2)
    for gold in ("Lisbon", 4, -1):
        with pytest.raises(ValueError, match=f"`answer` holds {gold!r}, which is none of the options 'ABCD'"):
            multiple_choice_reward(["B"], answer=[gold], choices=[CITIES])
    for letters in ("", "AA", "ab", "A1"):
        with pytest.raises(ValueError, match=f"`letters` is {letters!r}"):
            MultipleChoiceReward(letters=letters)


def test_is_picklable_and_marked() -> None:
    reward = pickle.loads(pickle.dumps(MultipleChoiceReward(letters="WX")))
    assert reward(["<answer>X</answer>"], answer=["X"]) == [1.0]
    assert reward.__name__ == multiple_choice_reward.__name__ == "multiple_choice_reward"
    assert is_row_wise(reward) and is_row_wise(multiple_choice_reward)


def test_choices_of_arc():
    """`allenai/ai2_arc` keeps options as a dict of two lists."""
    choices = {"text": ["ice", "steam", "water", "rock"], "label": ["A", "B", "C", "D"]}
    completions = ["The answer is C.", "The answer is B.", "The answer is D."]
    rewards = multiple_choice_reward(completions, answer=["C", "D", "D"], choices=[choices] * 3)
    assert rewards == [1.0, 0.0, 1.0]
    with pytest.raises(TypeError, match="`choices` holds 'ice, steam'"):
        multiple_choice_reward(["A"], answer=["A"], choices=["ice, steam"])
