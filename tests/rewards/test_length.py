"""Length rewards: the window of characters, and TRL's two behind checks of their own."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

from trl_grpo_ext.rewards.length import CosineLengthReward, LengthReward, soft_overlong_reward


def test_window_is_open_at_both_ends() -> None:
    texts = ["a" * n for n in (0, 100, 101, 1999, 2000, 5000)]
    assert LengthReward()(texts) == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_window_counts_characters_of_the_last_assistant_message() -> None:
    reward = LengthReward(min_chars=2, max_chars=5)
    completions = [[{"role": "assistant", "content": text}] for text in ("ab", "思考中", "a b\n", "12345")]
    assert reward(completions, prompts=[], completion_ids=[[7]] * 4) == [0.0, 1.0, 1.0, 0.0]


def test_soft_overlong_by_hand_and_by_trl() -> None:
    # L = 20, c = 5: nothing up to 15 tokens, then -1/5 for each more, -1 from 20 on
    ids = [[1] * n for n in (3, 15, 16, 19, 20, 21)]
    reward = soft_overlong_reward(max_completion_len=20, soft_punish_cache=5)
    assert reward(completion_ids=ids, prompts=None, completions=None) == [0.0, 0.0, -0.2, -0.8, -1.0, -1.0]
    assert reward(completion_ids=ids) == get_soft_overlong_punishment(20, 5)(completion_ids=ids)
    assert soft_overlong_reward(20, 0)(completion_ids=ids) == [0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def test_cosine_by_hand() -> None:
    reward = CosineLengthReward(max_len=8)
    ids = [[5] * n for n in (0, 2, 8, 11, 0, 2, 8)]
    completions = [r"\boxed{3}"] * 4 + [r"\boxed{4}"] * 3
    # right, 2 of 8 tokens: 0.5 + 0.5 / 2 * (1 + cos(pi / 4)) = 0.5 + 0.25 * 1.70710678 = 0.92677670
    # wrong, 2 of 8 tokens: -0.5 + (-1 + 0.5) / 2 * (1 + cos(pi / 4)) = -0.5 - 0.25 * 1.70710678 = -0.92677670
    expected = [1.0, 0.92677670, 0.5, 0.5, -1.0, -0.92677670, -0.5]
    assert reward(completions, completion_ids=ids, answer=["#### 3"] * 7) == pytest.approx(expected)


def test_cosine_has_no_opinion_without_gold() -> None:
    reward = CosineLengthReward(max_len=4)
    values = reward(["3", "3", "4"], completion_ids=[[1, 1]] * 3, solution=["3", None, "3"])
    assert values == [pytest.approx(0.75), None, pytest.approx(-0.75)]  # halfway: cos(pi / 2) = 0


def test_cosine_schedule_is_trls() -> None:
    options = {"min_value_wrong": -2.0, "max_value_wrong": -0.25, "min_value_correct": 0.125, "max_value_correct": 3.0}
    ids = [[9] * n for n in (1, 4, 6, 10)]
    completions = [[{"role": "assistant", "content": rf"\boxed{{{n}}}"}] for n in (5, 6, 5, 6)]
    theirs = get_cosine_scaled_reward(7, **options)
    ours = CosineLengthReward(7, **options)
    assert ours(completions, completion_ids=ids, solution=["5"] * 4) == theirs(completions, ["5"] * 4, ids)


def first_letter(completions: list[str], threshold: float, **kwargs: Any) -> list[float | None]:
    return [{"y": 1.0, "h": 0.5, "?": None}[text[0]] for text in completions]


def test_cosine_with_an_accuracy_of_ones_own() -> None:
    reward = CosineLengthReward(max_len=6, accuracy=first_letter)
    # partial credit is not right; all at half the schedule
    values = reward(["yes", "half", "?"], completion_ids=[[1] * 3] * 3, threshold=0.5)
    assert values == [pytest.approx(0.75), pytest.approx(-0.75), None]


def test_pickled_named_and_row_wise() -> None:
    ids = [[1] * 3, [1] * 6]
    cosine = pickle.loads(pickle.dumps(CosineLengthReward(max_len=6)))
    assert cosine(["7", "8"], completion_ids=ids, solution=["7", "7"]) == pytest.approx([0.75, -0.5])
    overlong = pickle.loads(pickle.dumps(soft_overlong_reward(6, 4)))
    assert overlong(completion_ids=ids) == [-0.25, -1.0]
    window = pickle.loads(pickle.dumps(LengthReward(1, 4)))
    assert window(["7", "777"]) == [0.0, 1.0]
    names = ["cosine_length_reward", "soft_overlong_punishment_reward", "length_reward"]
    assert [reward.__name__ for reward in (cosine, overlong, window)] == names
    assert cosine.reward_is_row_wise is True
    assert CosineLengthReward(max_len=6, accuracy=first_letter).reward_is_row_wise is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthReward(-1, 5), "`min_chars` is -1"),
        (lambda: LengthReward(5, 6), "`max_chars` is 6: it must be at least 7"),
        (lambda: soft_overlong_reward(0, 0), "`max_completion_len` is 0"),
        (lambda: soft_overlong_reward(10, 11), "`soft_punish_cache` is 11: it must be from 0 to 10"),
        (lambda: soft_overlong_reward(10, -1), "`soft_punish_cache` is -1"),
        (lambda: CosineLengthReward(0), "`max_len` is 0"),
    ],
)
def test_numbers_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthReward("1", 5), "`min_chars` must be a whole number, got str"),
        (lambda: LengthReward(1, True), "`max_chars` must be a whole number, got bool"),
        (lambda: soft_overlong_reward(10.5, 1), "`max_completion_len` must be a whole number"),
        (lambda: CosineLengthReward(10, accuracy="accuracy"), "`accuracy` must be a reward function, got str"),
    ],
)
def test_wrong_types(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_hostile_answers_go_through_our_accuracy() -> None:
    towers = ["9^{9^{9^{9}}}", r"\boxed{99999999!}", "{" * 50_000]
    values = CosineLengthReward(max_len=2)(towers, completion_ids=[[1], [1, 1], []], solution=["3"] * 3)
    assert values == pytest.approx([-0.75, -0.5, -1.0])
    assert math.isclose(values[0] or 0.0, -0.75)
