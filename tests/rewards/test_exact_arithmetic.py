"""Arithmetic on exact fractions, from tokens."""

from __future__ import annotations

from fractions import Fraction

import pytest

from trl_grpo_ext.rewards.exact_arithmetic import MAX_DIGITS, Expression, NotArithmetic


@pytest.mark.parametrize(
    ("tokens", "value", "operators", "numbers"),
    [
        ("1 + 2 * 3", Fraction(7), 2, 3),
        ("( 1 + 2 ) * 3", Fraction(9), 2, 3),
        ("2 ( 1 + 2 )", Fraction(6), 2, 3),
        ("8 - 4 - 2", Fraction(2), 2, 3),
        ("8 / 4 / 2", Fraction(1), 2, 3),
        ("1 / 3", Fraction(1, 3), 1, 2),
        ("- 3 * - 2", Fraction(6), 1, 2),
        ("1,234.5 + .5", Fraction(1235), 1, 2),
        ("50 % * 8", Fraction(4), 1, 2),
        ("( 20 + 30 ) % * 8", Fraction(4), 2, 3),
        ("7", Fraction(7), 0, 1),
    ],
)
def test_value(tokens: str, value: Fraction, operators: int, numbers: int) -> None:
    expression = Expression(tokens.split())
    assert expression.value() == value
    assert (expression.operators, expression.numbers) == (operators, numbers)


def test_a_percent_sign_may_mean_nothing() -> None:
    assert Expression("50 % + 1".split(), percent=Fraction(1)).value() == 51


@pytest.mark.parametrize(
    "tokens",
    [
        "",
        "1 +",
        "* 1",
        "( 1",
        "1 )",
        "1 / 0",
        "1 / ( 2 - 2 )",
        "1 2",
        "x",
        "6 / 2 ( 1 + 2 )",
        "( )",
        "9" * (MAX_DIGITS + 1),
    ],
)
def test_not_arithmetic(tokens: str) -> None:
    with pytest.raises(NotArithmetic):
        Expression(tokens.split()).value()
