r"""One notation for the many ways to write an answer."""

from __future__ import annotations

import re

import pytest

from trl_grpo_ext.rewards.notation import (
    enclosed,
    nesting,
    normalise,
    split_top,
    squeezed,
    words_dropped,
    words_kept,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("$5$", "5"),
        (r"\(5\).", "5"),
        (r"\[ 5 \]", "5"),
        ("$5", "$5"),  # money, not half a formula
        ("**5**", "5"),
        ('"5"', "5"),
        (r"\text{Paris}", "Paris"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left(1, 2\right]", "(1, 2]"),
        (r"x \leqslant 2", r"x \le 2"),
        ("x ≤ 2", r"x \le 2"),
        (r"x \geq 2", r"x \ge 2"),
        (r"32,\! 349", "32,349"),
        ("10{,}000", "10,000"),
        ("\u22125", "-5"),
        ("50\\%", "50%"),
        ("½", r"\frac{1}{2}"),
        ("90°", r"90^\circ"),
        (r"90^{\circ}", r"90^\circ"),
        ("2^10", "2^{10}"),
        ("x^2", "x^2"),
        ("12^{\\text{th}}", "12"),
        ("12th", "12"),
        ("sqrt(2)", r"\sqrt{2}"),
        ("√2", r"\sqrt{2}"),
        ("2pi", r"2\pi"),
        ("\x0crac{1}{2}", r"\frac{1}{2}"),  # \f was read as an escape
        (r"\mathrm{cm}", "cm"),
        ("5.", "5"),
        ("", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("x + 1", "x+1", True),
        ("x^{2}", "x^2", True),
        (r"\frac{1}{2}", r"\frac12", True),
        (r"10!\text{ ways}", r"10! \text{ways}", True),
        ("Evelyn Green", "evelyn green", True),
        ("X", "x", False),  # a variable, not a word
        ("1 2", "12", False),  # space between numbers or words counts
        ("new york", "newyork", False),
        ("x^{12}", "x^12", True),
        ("x^{1}2", "x^{12}", False),
    ],
)
def test_squeezed(one: str, other: str, equal: bool) -> None:
    assert (squeezed(normalise(one)) == squeezed(normalise(other))) is equal


def test_words() -> None:
    assert words_kept(r"12 \text{cm} per day") == "12 cm per day"
    assert words_dropped(r"12 \text{cm}") == "12"
    assert words_dropped(r"\text{twelve}") == "twelve"


def test_split_top() -> None:
    comma = re.compile(",")
    assert split_top("(1, 2), [3, 4), {5, 6}", comma) == ["(1, 2)", "[3, 4)", "{5, 6}"]
    assert split_top("1,, 2,", comma) == ["1", "2"]
    assert split_top(")1, 2", comma) == [")1", "2"]


@pytest.mark.parametrize(
    ("text", "inside"),
    [("(1, 2]", "1, 2"), ("(1)(2)", None), ("(1", None), ("1", None), ("", None), ("((1))", "(1)"), ("[ ]", "")],
)
def test_enclosed(text: str, inside: str | None) -> None:
    assert enclosed(text) == inside


def test_nesting() -> None:
    assert nesting("a(b[c{d}e]f)g") == 3
    assert nesting("()()") == 1
    assert nesting("((((") == 4
    assert nesting(")))(") == 1
