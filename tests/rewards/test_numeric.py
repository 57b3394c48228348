r"""Answers as exact numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest

from trl_grpo_ext.rewards.numeric import normalise, parse_quantity, same_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        ("42.0", Fraction(42)),
        ("042", Fraction(42)),
        ("42.", Fraction(42)),
        ("+42", Fraction(42)),
        ("-42", Fraction(-42)),
        ("\u221242", Fraction(-42)),
        (".5", Fraction(1, 2)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1 234", Fraction(1234)),
        (r"32,\! 349", Fraction(32349)),
        ("10{,}000", Fraction(10000)),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"\frac{-3}{0.5}", Fraction(-6)),
        ("2 1/2", Fraction(5, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        ("$5", Fraction(5)),
        (r"\$5.25", Fraction(21, 4)),
        ("-$5", Fraction(-5)),
        ("$5$", Fraction(5)),
        (r"\(5\)", Fraction(5)),
        ("**5**", Fraction(5)),
        (r"\text{5}", Fraction(5)),
        ("12 apples", Fraction(12)),
        ("12 apples per day.", Fraction(12)),
        (r"12\text{ cm}^2", Fraction(12)),
        ("12cm", Fraction(12)),
        (r"90^\circ", Fraction(90)),
        ("1.5e3", Fraction(1500)),
        (r"1.5 \times 10^{-3}", Fraction(3, 2000)),
        ("9" * 64, Fraction(10**64 - 1)),
    ],
)
def test_value(text: str, value: Fraction) -> None:
    quantity = parse_quantity(normalise(text))
    assert quantity is not None
    assert quantity.value == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "5x", "2pi", "2 pi", "5 million", "5 or 6", "1,23", "12,3456", "1/0", r"\frac{1}{0}", "3/4/5", "1..2",
     "x = 5", "(5)", "5 not 6", "10 pm", "9" * 65, "1e999999999", "1e100", r"10^{5}", "2^10", "1_000", "nan", "inf",
     "٣²"],
)  # fmt: skip
def test_not_a_plain_number(text: str) -> None:
    assert parse_quantity(normalise(text)) is None


@pytest.mark.parametrize(
    ("gold", "prediction", "same"),
    [
        ("1/2", "0.5", True),
        ("0.1", "0.10000", True),
        ("5", "6", False),
        ("5", "-5", False),
        ("50", r"50\%", True),  # a percent sign on one side: both readings
        ("0.5", "50%", True),
        ("50%", "50 percent", True),
        ("50%", "0.5%", False),
        ("0.5", "5%", False),
        ("12", "12 apples", True),
        ("12 apples", "12 apple", True),
        ("12 m/s", "13 m/s", None),  # a one-letter unit is not read as one: not a number for us
        ("12 meters", "12 feet", None),
        ("1/3", "0.33333333", None),  # perhaps rounded
        ("1/3", "0.3333", False),  # off by 1e-4
        ("1000000", "1000001", None),  # 1e-6 apart: math-verify decides (and says no)
    ],
)
def test_comparison(gold: str, prediction: str, same: bool | None) -> None:
    a, b = parse_quantity(normalise(gold)), parse_quantity(normalise(prediction))
    if a is None or b is None:
        assert same is None
    else:
        assert same_quantity(a, b) is same
