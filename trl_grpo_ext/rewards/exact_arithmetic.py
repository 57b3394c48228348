"""Arithmetic on exact fractions, from tokens and without `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

MAX_DIGITS = 24  # of a number


class NotArithmetic(ValueError):
    """These tokens have no value that is worth stating."""


class Expression:
    """Numbers, + - * / and parentheses, evaluated exactly.

    A number before a parenthesis multiplies it. The number of tokens bounds the depth of the recursion and, with
    `MAX_DIGITS`, the size of all numbers: callers bound it.

    Args:
        tokens: numbers (`12`, `1,234.5`, `.5`), `+`, `-`, `*`, `/`, `(`, `)`, and `%` behind a number or a parenthesis.
        percent: what a percent sign multiplies by, 1/100 or 1.
    """

    def __init__(self, tokens: Sequence[str], percent: Fraction = Fraction(1, 100)) -> None:
        self._tokens, self._percent, self._next = tokens, percent, 0
        self.operators = self.numbers = 0
        self._divides = self._multiplies_silently = False

    def value(self) -> Fraction:
        """The value of the whole; `operators` and `numbers` are counted on the way, so it is called once.

        Raises:
            NotArithmetic: the tokens are no expression, a number is too long, a divisor is 0, or it is not clear what
                is divided: 6 / 2(1 + 2).
        """
        value = self._sum()
        if self._next < len(self._tokens) or (self._divides and self._multiplies_silently):
            raise NotArithmetic
        return value

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1]

    def _sum(self) -> Fraction:
        value = self._product()
        while self._peek() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            self.operators += 1
            value += sign * self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._peek() in ("*", "/", "("):
            silent = self._peek() == "("
            divides = not silent and self._take() == "/"
            self.operators += 1
            self._multiplies_silently |= silent
            self._divides |= divides
            factor = self._factor()
            if divides and factor == 0:
                raise NotArithmetic
            value = value / factor if divides else value * factor
        return value

    def _factor(self) -> Fraction:
        token = self._peek()
        if token == "-":
            self._take()
            return -self._factor()
        if token == "(":
            self._take()
            value = self._sum()
            if self._peek() != ")":
                raise NotArithmetic
            self._take()
        elif token[:1].isdigit() or token[:1] == ".":
            self._take()
            self.numbers += 1
            if len(token) > MAX_DIGITS:
                raise NotArithmetic
            value = Fraction(token.replace(",", ""))
        else:
            raise NotArithmetic
        if self._peek() == "%":
            self._take()
            value *= self._percent
        return value
