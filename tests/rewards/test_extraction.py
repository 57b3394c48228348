r"""Where the answer is looked for, in a completion and in a gold column."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.extraction import extract_gold, extract_prediction, is_prose, last_boxed


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        # 1. the last answer block, whatever else the text holds
        (r"<think>\boxed{1} #### 2</think><answer>3</answer> The answer is 4", "3"),
        ("<answer>3</answer> or <answer> 5 </answer>", "5"),
        ("<answer>3</answer><answer> </answer>", "3"),  # a blank block is none
        (r"<answer>It is \boxed{7}, not 8.</answer>", "7"),
        ("<answer>The answer is 9.</answer>", "9"),
        ("<answer>x + 1</answer>", "x + 1"),
        # 2. the last box, braces balanced
        (r"\boxed{1}, no: \boxed{\frac{2}{3}} #### 4", r"\frac{2}{3}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\fbox{6}", "6"),
        # 3. GSM8K's marker
        ("The answer is 4\n#### 5\nmore", "5"),
        # 4. in words
        ("First 3. The answer is 12 apples. I hope 7 is fine", "12 apples"),
        ("**Answer:** 42\n", "42"),
        (r"The final answer is: $\frac{1}{2}$, which is 0.5", r"\frac{1}{2}"),
        ("The answer is 1. No, the answer is 3.5.", "3.5"),
        # 5. a formula
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("x^2 + 2x + 1", "x^2 + 2x + 1"),
        (r"We conclude that $x \leq 5$.", r"x \leq 5"),
        # 6. the last number
        ("There are 3 birds and 4 storks, 7 in all.", "7"),
        ("That is $1,234.50 in all", "$1,234.50"),
        ("It fell by 5 to −3 degrees", "−3"),
        ("In the end we get to 10-4", "4"),  # a minus sign, not a sign
        ("The variable x2 has no value", None),
        # nothing to be found
        ("", None),
        ("I do not know.", None),
    ],
)
def test_order_of_the_places(text: str, prediction: str | None) -> None:
    assert extract_prediction(text) == prediction


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("<think>maybe 5, the answer is 5</think>So it is 7", "7"),
        ("<think>the answer is 5", None),  # cut off while thinking
        ("<think>the answer is 5</think>", None),
        ("<think>so <answer>5</answer></think>", "5"),  # marked as final, if in the wrong place
        ("it opened earlier, 5</think>7", "7"),  # the template opened the thinking
    ],
)
def test_thinking_is_not_answering(text: str, prediction: str | None) -> None:
    assert extract_prediction(text) == prediction


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("42", "42"),
        (" 42\n", "42"),
        ("She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 1,813", "1,813"),
        ("We find #### 1\n#### 2", "2"),
        (r"Thus $x = \boxed{\frac{1}{2}}$, as \boxed{} shows.", None),  # the last box is blank
        (r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"Thus $x = \boxed{\frac{1}{2}$.", None),  # never closed
        ("<think>a</think><answer>12</answer>", "12"),
        ("Evelyn", "Evelyn"),
        ("", None),
        ("####", None),
        ("word " * 200, None),  # prose, not an answer
    ],
)
def test_gold_forms(text: str, gold: str | None) -> None:
    assert extract_gold(text) == gold


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces do not nest
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed 5.", "5"),
        (r"} \boxed{4} {", "4"),
        (r"\\boxed{840}", "840"),  # a backslash escaped twice, as some datasets have it
        ("boxed{4}", None),
    ],
)
def test_last_boxed(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


def test_prose_is_told_from_formulas() -> None:
    assert is_prose("those congruent to 2")
    assert is_prose("因此共有三只 3")
    assert not is_prose(r"\sin x + \text{some words} or 3 ab")


@pytest.mark.parametrize(
    "piece", ["{", r"\boxed{", "<answer>", "</answer>", "<answer></answer>", "#### ", "answer is ", "1,", "$"]
)
def test_is_linear_on_hostile_text(piece: str) -> None:
    # 200,000 characters: quadratic code would need minutes.
    extract_prediction(piece * (200_000 // len(piece)))
    extract_gold(piece * (200_000 // len(piece)))
