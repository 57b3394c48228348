"""The strict format reward of DeepSeek-R1, and the `<think>` that a chat template has already opened."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards import think_answer_format_reward

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
