r"""Where the answer is looked for, in a completion and in a gold column."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.extraction import (
    EXTRACT_FROM,
    after_thinking,
    extract_gold,
    extract_prediction,
    is_marked,
)
from trl_grpo_ext.rewards.formulas import MAX_ANSWER_CHARS


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        # 1. the last answer block, whatever else the text holds
        (r"<think>\boxed{1} #### 2</think><answer>3</answer> The answer is 4", "3"),
        ("<answer>3</answer> or <answer> 5 </answer>", "5"),
        ("<answer>3</answer><answer> </answer>", "3"),  # a blank block is none
        (r"<answer>It is \boxed{7}, not 8.</answer>", "7"),
        ("<answer>The answer is 9.</answer>", "9"),
        ("<answer>6 * 7 = 42\n#### 42</answer>", "42"),
        ("<answer>x + 1</answer>", "x + 1"),
        # 2. "the final answer is", unless a box or #### follows
        (r"\boxed{1}. The final answer is 2.", "2"),
        (r"The final answer is 2: \boxed{3}", "3"),
        ("The final answer is 2.\n#### 4", "4"),
        # 3. the last box, braces balanced
        (r"\boxed{1}, no: \boxed{\frac{2}{3}} #### 4", r"\frac{2}{3}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\fbox{6}", "6"),
        # 4. GSM8K's marker
        ("The answer is 4\n#### 5\nmore", "5"),
        ("#### Conclusion of the matter\nIt is 7.", "7"),  # a heading of that level
        # 5. in words: the number that the sentence begins with, or else its last formula or number
        ("First 3. The answer is 12 apples. I hope 7 is fine", "12 apples"),
        ("**Answer:** 42\n", "42"),
        (r"The final answer is: $\frac{1}{2}$, which is 0.5", r"\frac{1}{2}"),
        ("The answer is 1. No, the answer is 3.5.", "3.5"),
        ("The answer is about 12 because 7 + 5 = 12", "12"),
        ("The answer is the sum of 3 and 4, which is 7.", "7"),
        ("The answer is 3 times 5, which is 15.", "15"),
        ("The answer is 15, which is 3 times 5.", "15"),
        ("The answer is 12 apples, which is 2 more than 10.", "12 apples"),
        ("The answer is the sum of 3 and 4, hence 7.", "7"),
        ("The answer is $x = 1$ or $x = 2$.", "$x = 1$ or $x = 2$"),
        ("La respuesta es 8.", "8"),
        ("答案是 8。", "8"),
        # 6. a formula
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("x^2 + 2x + 1", "x^2 + 2x + 1"),
        (r"We conclude that $x \leq 5$.", r"x \leq 5"),
        (r"We conclude that \[x \leq 5.\]", r"x \leq 5."),
        (r"As $x = 3$, there are 4 of them.", "4"),  # a number follows it
        # 7. the last number, or the result that its sentence begins with
        ("There are 3 birds and 4 storks, 7 in all.", "7"),
        ("That is $1,234.50 in all", "$1,234.50"),
        ("It fell by 5 to \u22123 or so", "\u22123"),
        ("It takes 30 minutes or so", "30 minutes"),  # with its unit, if it is a known one
        ("It costs 5 million dollars.", "5 million dollars"),
        ("It is 50% of them all.", "50%"),
        ("In the end we get to 10-4", "4"),  # a minus sign, not a sign
        ("8.5 * 4 = 34. So it takes 34 hours in 4 weeks.", "34 hours"),
        ("8.5 * 4 = 34. In 4 weeks it takes so many hours.", "4 weeks"),
        ("The variable x2 has no value", None),
        # nothing to be found
        ("", None),
        ("I do not know.", None),
    ],
)
def test_order_of_the_places(text: str, prediction: str | None) -> None:
    assert extract_prediction(text) == prediction


def test_places_by_choice_in_their_order() -> None:
    text = r"\boxed{1} The answer is 2. That is all of 3 there is."
    assert extract_prediction(text) == "1"
    assert extract_prediction(text, ["answer_is", "boxed"]) == "2"
    assert extract_prediction(text, ["answer_tag", "last_number", "boxed"]) == "3"
    assert extract_prediction(text, ["answer_tag", "hashes"]) is None


def test_an_unknown_place() -> None:
    with pytest.raises(ValueError, match=r"`extract_from` names \['box'\]: choose from \('answer_tag', "):
        extract_prediction("1", ["boxed", "box"])
    assert EXTRACT_FROM == (
        "answer_tag", "final_answer", "boxed", "hashes", "answer_is", "formula", "last_number"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("<think>maybe 5, the answer is 5</think>So it is 7", "7"),
        ("<think>the answer is 5", None),  # cut off while thinking
        ("<think>the answer is 5</think>", None),
        ("<think>so <answer>5</answer>", "5"),  # to state the answer ends the thinking
        ("<think>so <answer>5</answer></think>", None),  # but here it was part of it
        ("it opened earlier, 5</think>7", "7"),  # the template opened the thinking
    ],
)
def test_thinking_is_not_answering(text: str, prediction: str | None) -> None:
    assert extract_prediction(text) == prediction


def test_after_thinking() -> None:
    assert after_thinking("<think>a</think>b<think>c</think>d") == "d"
    assert after_thinking("b<think>c") == "b"
    assert after_thinking("no tags") == "no tags"


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("42", "42"),
        (" 42\n", "42"),
        ("She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 1,813", "1,813"),
        ("We find #### 1\n#### 2", "2"),
        (r"Thus $x = \boxed{\frac{1}{2}}$, as \boxed{} shows.", r"\frac{1}{2}"),  # a blank box is none
        (r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"Thus $x = \boxed{\frac{1}{2}$.", r"\frac{1}{2}"),  # never closed, but nothing else is open
        (r"Thus $x = \boxed{\frac{1}{2$.", None),  # cut off
        ("<think>a</think><answer>12</answer>", "12"),
        ("We add all of them up, so the answer is 12.", "12"),
        ("Evelyn", "Evelyn"),
        ("", None),
        ("####", None),
        ("word " * 200, None),  # prose, not an answer
    ],
)
def test_gold_forms(text: str, gold: str | None) -> None:
    assert extract_gold(text) == gold


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("42", True),
        ("New York", True),
        ("He goes home. #### 42", True),
        (r"He goes home with \boxed{42} dollars", True),
        ("He goes home. The answer is 42", True),
        ("<answer>He goes home with it</answer>", True),
        ("He goes home with all of the 42 dollars", False),
    ],
)
def test_marked(text: str, marked: bool) -> None:
    assert is_marked(text) is marked


@pytest.mark.parametrize(
    "piece",
    ["{", "\\", r"\boxed{", r"\boxed{1},", "<answer>", "</answer>", "<answer></answer>", "#### ", "answer is ", "1,",
     "$", "$1$", "final answer ", "= 1 ", "a "],
)  # fmt: skip
def test_is_linear_on_hostile_text(piece: str) -> None:
    # 200,000 characters: quadratic code would need minutes.
    answers = [read(piece * (200_000 // len(piece))) for read in (extract_prediction, extract_gold)]
    assert all(answer is None or 0 < len(answer) <= MAX_ANSWER_CHARS for answer in answers)


def test_white_space_between_formulas_costs_linear_time():
    # Quadratic, it took 15 seconds
    assert extract_prediction("The answer is $5$" + " " * 50_000 + "x $6$") is not None


def test_many_statements_that_state_nothing_cost_linear_time():
    assert extract_prediction("The answer is correct. " * 40_000 + "It is 7") == "7"
