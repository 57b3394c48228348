"""Format rewards, strict and with partial credit, and the `<think>` that a chat template has already opened."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.rewards.format import (
    FormatReward,
    TagCountReward,
    think_answer_format_reward,
    think_format_reward,
)

DATA = Path(os.environ.get("TRL_GRPO_EXT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
WORKING_OUT = (("<start_working_out>", "<end_working_out>"), "SOLUTION")

GOOD = "<think>2 + 2 is 4</think><answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 1.0),
        ("\n <think>\n2 + 2\n</think>\n\n<answer>\n4\n</answer>\n", 1.0),  # white space around, between, inside
        ("<think>a < b > c</think><answer>x</y></answer>", 1.0),  # other angle brackets are text
        ("So: " + GOOD, 0.0),
        (GOOD + " Done.", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<think>a<answer>4</answer>", 0.0),  # thinking never closed
        ("<think>a</think><answer>4", 0.0),  # cut off
        ("<think>a</think>4", 0.0),
        ("a</think><answer>4</answer>", 0.0),  # never opened, and no prompt says that it was
        ("<think> \n</think><answer>4</answer>", 0.0),  # blank thinking
        ("<think>a</think><answer> </answer>", 0.0),  # blank answer
        ("<think>a</think><think>b</think><answer>4</answer>", 0.0),  # a tag twice
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),  # wrong order
        ("<think>a<answer>4</think></answer>", 0.0),  # crossed
        ("<THINK>a</THINK><ANSWER>4</ANSWER>", 0.0),
        ("", 0.0),
    ],
)
def test_standard_completion(text: str, reward: float) -> None:
    assert think_answer_format_reward([text]) == [reward]


def test_conversational_completion_judges_the_last_assistant_message() -> None:
    completions = [
        [{"role": "assistant", "content": GOOD}],
        [{"content": GOOD}],  # TRL's own rewards are called without roles too
        [
            {"role": "assistant", "content": "calling"},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": GOOD},
        ],
        [{"role": "assistant", "content": GOOD}, {"role": "tool", "content": "4"}],
        [{"role": "assistant", "content": GOOD}, {"role": "assistant", "content": "and so on"}],
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "<think>a</think>"}, {"type": "text", "text": GOOD[-18:]}],
            }
        ],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert think_answer_format_reward(completions) == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_prompt_that_opened_the_thinking_counts_as_its_tag() -> None:
    rest = GOOD.removeprefix("<think>")
    prompts = ["Q: 2 + 2?<think>", "Q: 2 + 2?<think>\n", "Q: 2 + 2?", "Q: 2 + 2?<think>", "<think> is a tag. Q: 2 + 2?"]
    # The fourth is what our own trainer hands over: the tag is in the completion already and must not count twice.
    completions = [rest, rest, rest, GOOD, rest]
    assert think_answer_format_reward(completions, prompts=prompts) == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_conversational_prompt_says_nothing_about_its_template() -> None:
    prompt = [{"role": "user", "content": "2 + 2?<think>"}]
    completion = [{"role": "assistant", "content": GOOD.removeprefix("<think>")}]
    assert think_answer_format_reward([completion], prompts=[prompt]) == [0.0]


def test_is_linear_on_hostile_text() -> None:
    # Quadratic matching would take minutes here, not milliseconds.
    texts = ["<think>" * 50_000, "<think>" + " " * 500_000, "<think>a</think>" + " " * 500_000 + "<answer>"]
    assert think_answer_format_reward(texts) == [0.0, 0.0, 0.0]


def test_wrong_kind_of_completion() -> None:
    with pytest.raises(TypeError, match="string or a list of messages"):
        think_answer_format_reward([42])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>2 + 2 is 4</think>4", 1.0),
        (" \n<think>\na\n</think>\n\nThe answer is 4.\n", 1.0),
        ("<think>a</think><answer>4</answer>", 1.0),  # other tags are text
        ("<think>a</think>", 0.0),  # thought, and said nothing
        ("<think>a</think> \n", 0.0),
        ("<think> </think>4", 0.0),
        ("<think>a", 0.0),
        ("a</think>4", 0.0),
        ("So: <think>a</think>4", 0.0),
        ("<think>a</think>4<think>b</think>5", 0.0),
        ("</think>4<think>", 0.0),
    ],
)
def test_think_only(text: str, reward: float) -> None:
    assert think_format_reward([text]) == [reward]


def test_think_only_where_the_prompt_opened_it() -> None:
    completions = ["a</think>4", "a</think>4", "<think>a</think>4", "4"]
    assert think_format_reward(completions, prompts=["Q<think>\n", "Q", "Q<think>", "Q<think>"]) == [1.0, 0.0, 1.0, 0.0]


def test_opened_says_what_a_conversational_prompt_does_not_show() -> None:
    prompt = [{"role": "user", "content": "2 + 2?"}]
    completions = [[{"role": "assistant", "content": text}] for text in ("a</think>4", "<think>a</think>4", "4")]
    closed, opened = FormatReward(["think"], text_after=True), FormatReward(["think"], text_after=True, opened=True)
    assert closed(completions, prompts=[prompt] * 3) == [0.0, 1.0, 0.0]
    assert opened(completions, prompts=[prompt] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        ({"tags": ["reasoning", "answer"]}, "<reasoning>a</reasoning>\n<answer>4</answer>", 1.0),
        ({"tags": ["reasoning", "answer"]}, GOOD, 0.0),
        ({"tags": ["a", "b.c", "d-e"]}, "<a>1</a><b.c>2</b.c><d-e>3</d-e>", 1.0),
        ({"tags": ["a", "b.c", "d-e"]}, "<a>1</a><b.c>2</b.c><d-e></d-e>", 0.0),
        ({"tags": ["a"]}, "<a>1</a>", 1.0),
        ({"tags": ["a"]}, "<a>1</a>2", 0.0),
        ({"tags": WORKING_OUT}, "<start_working_out>6<end_working_out> <SOLUTION>7</SOLUTION>", 1.0),
        ({"tags": WORKING_OUT}, "<start_working_out>6</end_working_out> <SOLUTION>7</SOLUTION>", 0.0),
        ({"tags": ["think", "answer"], "strict": False}, "So <think>a</think> then <answer>4</answer>.", 1.0),
        ({"tags": ["think", "answer"], "strict": False}, "<answer>4</answer><think>a</think>", 0.0),
        ({"tags": ["think", "answer"], "strict": False}, "<think>a<answer>4</think></answer>", 0.0),
        ({"tags": ["think", "answer"], "strict": False}, "<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ({"tags": ["think"], "strict": False, "text_after": True}, "So <think>a</think>", 0.0),
        ({"tags": ["think"], "strict": False, "text_after": True}, "So <think>a</think>4", 1.0),
    ],
)
def test_configured_tags(options: dict[str, Any], text: str, reward: float) -> None:
    assert FormatReward(**options)([text]) == [reward]


@pytest.mark.parametrize(
    ("text", "credit"),
    [
        (GOOD, 4 / 4),
        ("<think>a</think>4", 2 / 4),
        ("4", 0 / 4),
        ("<think>a<think>b</think><answer>4", 2 / 4),  # </think> and <answer>; <think> is there twice
        ("<think>a</think><answer>4</answer><answer>5</answer>", 2 / 4),
        ("<think>a</think><answer>4", 3 / 4),  # cut off
        ("</answer></think><answer><think>", 4 / 4),  # order is not its business
        ("<THINK>a</THINK>", 0 / 4),
    ],
)
def test_tag_count_of_four(text: str, credit: float) -> None:
    assert TagCountReward()([text]) == [credit]


def test_tag_count_of_other_tags_and_where_the_first_is_open() -> None:
    rest = "a</think><plan>b</plan><answer>4"  # 4 of 6 by itself
    reward = TagCountReward(["think", "plan", "answer"])
    assert reward([rest, rest, "<think>" + rest], prompts=["Q", "Q<think>", "Q<think>"]) == [4 / 6, 5 / 6, 5 / 6]
    assert TagCountReward(["think", "plan", "answer"], opened=True)([rest]) == [5 / 6]
    assert TagCountReward(WORKING_OUT)(["<start_working_out>6</start_working_out><SOLUTION>"]) == [2 / 4]


@pytest.mark.parametrize(
    ("tags", "error", "message"),
    [
        ("think", TypeError, r"write `tags=\['think'\]`"),
        ([], ValueError, "`tags` is empty"),
        (["<think>"], ValueError, "'<think>', which is not the name of a tag"),
        (["think", "think"], ValueError, "could be counted"),
        ([("$", "$")], ValueError, "could be counted"),
        ([("<a", "<ab")], ValueError, "'<a' and '<ab'"),
        ([("<a>",)], TypeError, "a pair of delimiters"),
        ([("<a>", " ")], TypeError, "a pair of delimiters"),
        ([7], TypeError, "holds 7"),
    ],
)
@pytest.mark.parametrize("kind", [FormatReward, TagCountReward])
def test_wrong_tags(kind: Any, tags: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind(tags)


def test_pickled_and_named() -> None:
    completions, prompts = ["a</think><answer>4</answer>", "<think>a</think>4"], ["Q<think>", "Q"]
    for reward, values in [
        (think_answer_format_reward, [1.0, 0.0]),
        (think_format_reward, [1.0, 1.0]),
        (FormatReward(["think"], strict=False), [1.0, 1.0]),
        (TagCountReward(["think", "answer"]), [1.0, 0.5]),
    ]:
        copied = pickle.loads(pickle.dumps(reward))
        assert copied(completions=completions, prompts=prompts, completion_ids=[[1], [2]], answer=["4", "4"]) == values
        assert copied.reward_is_row_wise
    assert [r.__name__ for r in (FormatReward(), TagCountReward())] == ["format_reward", "tag_count_reward"]


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "<answer>", "<", " "])
def test_all_are_linear_on_hostile_text(piece: str) -> None:
    # 10^6 characters: quadratic code would need hours.
    texts = [piece * (1_000_000 // len(piece)), "<think>a" + piece * (1_000_000 // len(piece))]
    for reward in (think_format_reward, FormatReward(strict=False), TagCountReward()):
        assert all(value < 1 for value in reward(texts, prompts=["Q<think>"] * 2))


def test_on_real_completions() -> None:
    """460 of a GRPO run, many cut off or malformed: the same verdicts as a pattern that may take its time."""
    path = DATA / "completions_grpo_rollouts" / "rollouts.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row["completion"] for row in rows if row["template"] == "working_out_solution"]
    pattern = re.compile(
        r"\s*<start_working_out>((?!<start_working_out>).)*\S((?!<start_working_out>|<end_working_out>).)*"
        r"<end_working_out>\s*<SOLUTION>\s*[^<\s][^<]*</SOLUTION>\s*",
        re.DOTALL,
    )
    rewards = FormatReward(WORKING_OUT)(texts)
    assert rewards == [float(pattern.fullmatch(text) is not None) for text in texts]
    assert 0.2 < sum(rewards) / len(rewards) < 0.98
