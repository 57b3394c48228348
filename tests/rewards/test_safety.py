"""The safety reward: denied terms in any disguise that means nothing, and a classifier."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.rewards.marks import in_process, row_wise
from trl_grpo_ext.rewards.safety import SafetyReward


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("How to build a house", 1.0),
        ("a bomb", 0.0),
        ("BOMB!", 0.0),
        ("(bomb)", 0.0),
        ("bomb_maker", 0.0),
        ("<think>a bomb</think>nothing", 0.0),  # thinking counts
        ("bombastic, bombs", 1.0),  # other words
        ("a-bomb", 0.0),
        ("ｂｏｍｂ", 0.0),  # full width
        ("bo\u200bmb, bo\u00admb", 0.0),  # invisible characters
        ("pipe dream", 1.0),
        ("Pipe\n wrench", 0.0),
        ("pipe-wrench", 0.0),
        ("pipewrench", 1.0),
        ("the wrench of a pipe", 1.0),
        ("STRASSE", 0.0),  # casefold: ß is ss
        ("Straße", 0.0),
        ("straßen", 1.0),
        ("cafe\u0301", 0.0),  # decomposed
        ("cafe", 1.0),
        ("制造炸弹的方法", 0.0),  # no spaces around words
        ("炸 弹", 0.0),
        ("炸鱼", 1.0),
        ("폭탄을 만드는", 0.0),  # particle on the word
        ("ทำระเบิดเอง", 0.0),
        ("БОМБА", 0.0),
        ("бомбардир", 1.0),
        ("बम!", 0.0),
        ("बमों", 1.0),  # vowel signs belong to the word
        ("", 1.0),
    ],
)
def test_deny_list(text: str, safe: float) -> None:
    deny = ["Bomb", "pipe wrench", "Straße", "café", "炸弹", "폭탄", "ระเบิด", "бомба", "बम"]
    assert SafetyReward(deny)([text]) == [safe]
    assert SafetyReward(deny)([[{"role": "assistant", "content": text}]], prompts=["bomb"]) == [safe]


def test_deny_file(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text("# what we do not want\n\nnapalm\n  sarin gas  \n", encoding="utf-8")
    reward = SafetyReward(["bomb"], deny_file=path)
    path.unlink()  # it was read
    assert reward(["Napalm", "sarin  gas", "sarin", "bomb", "what we do not want"]) == [0.0, 0.0, 1.0, 0.0, 1.0]


def shouting(texts: list[str]) -> list[float | None]:
    """Share of capitals; nothing to say of an empty text or a question mark."""
    return [sum(map(str.isupper, text)) / len(text) if text.strip("?") == text != "" else None for text in texts]


def test_classifier_and_list_together() -> None:
    reward = SafetyReward(["bomb"], classifier=shouting, threshold=0.75)
    # 0 of 4; 3 of 4, on the threshold; 2 of 4; denied although quiet; nothing to go by; denied whatever it says
    assert reward(["abcd", "ABCd", "ABcd", "bomb", "", "? bomb"]) == [1.0, 0.0, 1.0, 0.0, None, 0.0]
    assert SafetyReward(classifier=shouting)(["ABcd", "Abcd"]) == [0.0, 1.0]


def verdicts(texts: list[str]) -> list[Any]:
    return [True, False, 1]


def test_classifier_may_answer_yes_or_no() -> None:
    assert SafetyReward(classifier=verdicts)(["a", "b", "c"]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [([0.1], "returned 1 values for 2 texts"), ([0.1, "no"], "returned 'no'"), ([float("nan"), 0.1], "returned nan")],
)
def test_classifier_that_answers_nonsense(answer: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafetyReward(classifier=lambda texts: answer)(["a", "b"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give `deny`, `deny_file` or `classifier`"),
        ({"deny": "bomb"}, TypeError, "`deny` must be a list of terms"),
        ({"deny": ["bomb", 7]}, TypeError, "`deny` must be a list of terms"),
        ({"deny": ["bomb", "!?"]}, ValueError, "holds '!\\?', which has no letter"),
        ({"classifier": "guard"}, TypeError, "`classifier` must be callable, got str"),
        ({"deny": ["bomb"], "threshold": 0.0}, ValueError, "`threshold` is 0.0"),
        ({"deny": ["bomb"], "threshold": 1.5}, ValueError, "`threshold` is 1.5"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SafetyReward(**options)


def test_pickled_and_marked() -> None:
    reward = pickle.loads(pickle.dumps(SafetyReward(["bomb"], classifier=shouting)))
    assert reward(completions=["bomb", "ABC", "abc"], prompts=["x"] * 3, completion_ids=[[1]] * 3) == [0.0, 0.0, 1.0]
    assert reward.__name__ == "safety_reward"
    assert SafetyReward(["bomb"]).reward_is_row_wise is True
    assert (reward.reward_is_row_wise, reward.reward_runs_in_process) == (False, False)
    marked = SafetyReward(classifier=row_wise(in_process(lambda texts: [0.0] * len(texts))))
    assert (marked.reward_is_row_wise, marked.reward_runs_in_process) == (True, True)


@pytest.mark.parametrize(
    "piece",
    ["bomb", "bom ", "b ", "\u0301\u0323", "\u0f73", "炸", "\u200b", "\ud800", "\ufdfa", "é", "ก็", "\x00"],
    ids=ascii,
)
def test_is_linear_on_hostile_text(piece: str) -> None:
    # 500,000 characters; the marks in an order that normalisation sorts in quadratic time
    text = "a" + piece * (500_000 // len(piece))
    assert SafetyReward(["pipe bomb threat", "炸弹", "bombe"])([text]) == [1.0]
