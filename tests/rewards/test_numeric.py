r"""Answers as exact numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest

from trl_grpo_ext.rewards.notation import normalise
from trl_grpo_ext.rewards.numeric import Quantity, is_unit, parse_quantity, rounds_to, same_number, same_quantity


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
        ("3:4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"\frac{-3}{0.5}", Fraction(-6)),
        ("2 1/2", Fraction(5, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"-2\frac{1}{2}", Fraction(-5, 2)),
        (r"0.1\overline{6}", Fraction(1, 6)),  # 1/10 + 6/90
        (r"0.\overline{12}", Fraction(12, 99)),
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
        (r"12\text{ m}", Fraction(12)),
        (r"90^\circ", Fraction(90)),
        ("5 million", Fraction(5_000_000)),
        ("2 dozen eggs", Fraction(24)),
        ("1.5e3", Fraction(1500)),
        (r"1.5 \times 10^{-3}", Fraction(3, 2000)),
        (r"2 \cdot 10^5", Fraction(200_000)),
        ("9" * 64, Fraction(10**64 - 1)),
    ],
)
def test_value(text: str, value: Fraction) -> None:
    quantity = parse_quantity(normalise(text))
    assert quantity is not None
    assert quantity.value == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "5x", "2pi", "2 pi", "5 or 6", "1,23", "12,3456", "1/0", r"\frac{1}{0}", "3/4/5", "1..2",
     "x = 5", "(5)", "5 not 6", "9" * 65, "1e999999999", "1e100", r"10^{5}", "2^10", "1_000", "nan", "inf", "٣²"],
)  # fmt: skip
def test_not_a_plain_number(text: str) -> None:
    assert parse_quantity(normalise(text)) is None


def test_what_else_a_quantity_says() -> None:
    assert parse_quantity("50%") == Quantity(Fraction(50), True, ())
    assert parse_quantity("1.50") == Quantity(Fraction(3, 2), False, (), 2)
    assert parse_quantity("$3") == Quantity(Fraction(3), False, ("dollar",), 0)
    assert parse_quantity("7 red apples") == Quantity(Fraction(7), False, ("red", "apple"), 0)


@pytest.mark.parametrize(
    ("gold", "prediction", "same"),
    [
        ("1/2", "0.5", True),
        ("0.1", "0.10000", True),
        ("5", "6", False),
        ("5", "-5", False),
        # A percent sign on one side: both readings
        ("50", r"50\%", True),
        ("0.5", "50%", True),
        ("50%", "50 percent", True),
        ("50%", "0.5%", False),
        ("0.5", "5%", False),
        # Units of one kind are converted, of two kinds differ; words that are no unit do not count
        ("12", "12 apples", True),
        ("12 apples", "12 pears", True),
        ("12 m/s", "13 m/s", None),
        ("12 meters", "12 feet", False),
        ("12 meters", "1200 cm", True),
        ("12 meters", r"12\text{ m}", True),
        ("12 meters", "12 m", None),  # 12 times m, for all we know
        ("1 foot", "12 inches", True),
        ("2 hours", "120 minutes", True),
        ("2 hours", "2 minutes", False),
        ("2 hours", "2 meters", False),
        ("$5", "5 cents", False),
        ("$5", "500 cents", True),
        ("$5", "€5", False),
        ("5 dollars", "$5.00", True),
        ("5", "5 million", False),
        ("5 million", "5,000,000", True),
        # Rounding: a gold decimal of two places or more and a fraction that never ends; not the reverse
        ("6.67", "20/3", True),
        ("6.66", "20/3", True),  # cut off
        ("6.7", "20/3", False),
        ("20/3", "6.67", False),
        ("0.33", "1/3", True),
        ("0.34", "1/3", False),
        ("0.12", "1/8", False),  # which is 0.125 exactly
        # Perhaps rounded, and not for us to say
        ("1/3", "0.33333333", None),
        ("1/3", "0.3333", False),  # off by 1e-4
        ("1000000", "1000001", False),  # two whole numbers
        # A decimal comma, where the other side has a decimal point
        ("3,14", "3.14", True),
        ("3.14", "3,15", False),
        ("3,14", "314", None),  # a list of two
        # No number
        ("x", "5", None),
        ("5", "5x", None),
    ],
)
def test_comparison(gold: str, prediction: str, same: bool | None) -> None:
    assert same_number(normalise(gold), normalise(prediction)) is same


def test_rounding_needs_decimals() -> None:
    third = Fraction(1, 3)
    assert rounds_to(Quantity(Fraction(33, 100), False, (), 2), third)
    assert not rounds_to(Quantity(Fraction(3, 10), False, (), 1), third)
    assert not rounds_to(Quantity(Fraction(33, 100), False, ()), third)
    assert rounds_to(Quantity(Fraction(-33, 100), False, (), 2), -third)
    assert same_quantity(Quantity(third, False, ()), Quantity(third, False, ())) is True


def test_units() -> None:
    assert [is_unit(word) for word in ("feet", "Meters", "kg", "apples", "m", "of")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
