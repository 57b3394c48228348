r"""Symbolic comparison of two answers: math-verify, behind a guard against inputs that would never finish.

math-verify bounds its work with `signal.alarm`, which exists only in the main thread and cannot interrupt arithmetic on
huge integers. So a guard refuses cheaply, before parsing, whatever sympy would evaluate into something huge, anywhere;
and what may take long but can be interrupted, outside the main thread. A refused answer can still be right by its text
or as a number.

Expressions are compared by their values at a few points, which decides almost all of them and costs little; sets,
equations and matrices, and what has no values there, by math-verify's own comparison.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef

from trl_grpo_ext.rewards.formulas import MAX_ANSWER_CHARS
from trl_grpo_ext.rewards.notation import nesting

# Without units: it would take the `m` of `n + m` for metres. Units are dropped before (`notation.words_dropped`).
_EXTRACTION = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    )
]
PARSE_SECONDS = 3
VERIFY_SECONDS = 3
# Limits found by trying: what passes them took 3 seconds at most on a busy core; all answers of MATH but one pass.
MAX_NESTING = 10
_MAX_DIGIT_RUN = 64
_MAX_FUNCTIONS = 6
_MAX_NUMERIC_EXPONENT = 9_999  # of a number: 2^{2024} is a real answer
_MAX_EXPONENT_DIGITS = 6  # in one exponent, so that no product or sum in it is huge
_MAX_EXPONENT = 100  # where there are variables: simplifying polynomials
_MAX_EXPANSION = 24  # sum of the n of all (..)^n, times the number of variables: sympy multiplies them out

# Any factorial but that of a plain number below 100 (`7!/16` is a real answer), of a letter, or of letters in brackets:
# not 99999999!, (100 - 1)!, 5!!, 50!^{999}.
_FACTORIAL = re.compile(
    r"(?<!\\)(?<!(?<!\d)\d)(?<!(?<!\d)\d\d)(?<!(?<![\\A-Za-z])[A-Za-z])(?<!\))!(?!=)|!\s*(?:!|\^|\*\*)"
    r"|\((?:[^()]*(?:\d\d|[!^\\*])[^()]*|[^()]*\([^()]*\)[^()]*)\)\s*!"
)
# Operators that grow like a factorial or a tower.
_UNBOUNDED = re.compile(
    r"\\(?:Gamma|zeta|choose)(?![a-zA-Z])|\\(?:exp|sinh|cosh|tanh)\b.*\d{3}"
    r"|\\[dt]?binom(?!\s*\{[-+\w ]{1,12}\}\s*\{[-+\w ]{1,12}\})|\\[dt]?binom.*\d{4}"
    r"|\\(?:sum|prod|int|oint|iint|lim)(?![a-zA-Z]).*(?:\d{3}|\\(?:sum|prod|int|oint|iint|lim)(?![a-zA-Z]))",
    re.DOTALL,
)
_TERM_BY_TERM = re.compile(r"\\(?:sum|prod|int|oint|iint|lim)(?![a-zA-Z])")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|sinh|cosh|tanh|log|ln|exp|lg)(?![a-zA-Z])")
_GREEK = re.compile(r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)(?![a-zA-Z])")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*(?P<exponent>\{|\(|[-+]?(?:\d+|[A-Za-z]|\\[A-Za-z]+))")
_OPEN, _CLOSE = "{([", "})]"

_NOT_SAMPLED = (
    sympy.Sum,
    sympy.Product,
    sympy.Integral,
    sympy.Limit,
    sympy.Derivative,
    sympy.UnevaluatedExpr,
    AppliedUndef,
)
_MAX_SYMBOLS = 12
_STARTS = ((6, 19), (11, 17), (-9, 23), (31, 18), (-29, 12), (63, 17))
_TOLERANCE = sympy.Float("1e-12")


def symbolically_equal(gold: str, prediction: str) -> bool:
    """Whether the two answers are mathematically equal; False for what cannot be parsed or must not be."""
    if is_hostile(gold) or is_hostile(prediction):
        return False
    can_interrupt = threading.current_thread() is threading.main_thread()
    if not can_interrupt and (_TERM_BY_TERM.search(gold) or _TERM_BY_TERM.search(prediction)):
        return False
    parsed_gold = _parsed(gold)
    if not parsed_gold:
        return False
    parsed_prediction = _parsed(prediction)
    if not parsed_prediction:
        return False
    same = _same_values(parsed_gold[0], parsed_prediction[0])
    if same is not None:
        return same
    if not can_interrupt and any(
        is_costly(text) or isinstance(parsed[0], sympy.Expr)
        for text, parsed in ((gold, parsed_gold), (prediction, parsed_prediction))
    ):
        return False
    # Inequalities and intervals may stand on either side: `x > 1` and `(1, \infty)`.
    return verify(
        parsed_gold, parsed_prediction, allow_set_relation_comp=True, timeout_seconds=_seconds(VERIFY_SECONDS)
    )


def numeric_value(text: str) -> Decimal | None:
    """The value of an expression without variables, to 30 digits; None for anything else."""
    if is_hostile(text) or _TERM_BY_TERM.search(text) or _count_variables(text):
        return None
    parsed = _parsed(text)
    value = _value(parsed[0], {}) if parsed and isinstance(parsed[0], sympy.Expr) else None
    return Decimal(str(value)) if isinstance(value, sympy.Float) else None


def is_hostile(text: str) -> bool:
    """Whether to evaluate this could take longer than any real answer deserves; decided without parsing it."""
    text = re.sub(r"\s+!", "!", text)
    return (
        len(text) > MAX_ANSWER_CHARS
        or nesting(text) > MAX_NESTING
        or re.search(rf"\d{{{_MAX_DIGIT_RUN + 1}}}", text) is not None
        or _FACTORIAL.search(text) is not None
        or _UNBOUNDED.search(text) is not None
        or _has_huge_power(text)
    )


def is_costly(text: str) -> bool:
    """Whether to simplify this could take long: many functions, or powers of sums that would be multiplied out."""
    if len(_FUNCTION.findall(text)) > _MAX_FUNCTIONS:
        return True
    variables = _count_variables(text)
    exponents = [
        sum(int(run) for run in re.findall(r"\d+", _exponent(text, match)[0]))
        for match in _EXPONENT.finditer(text)
        if text[: match.start()].rstrip()[-1:] in tuple(_CLOSE)
    ]
    return sum(exponents) * variables > _MAX_EXPANSION or sum(exponents) > _MAX_EXPONENT


def _parsed(text: str) -> list[Any]:
    # Dollars would end the formula early; math-verify reads LaTeX only between delimiters
    parsed: list[Any] = parse(
        f"${text.replace('$', ' ')}$", extraction_config=_EXTRACTION, parsing_timeout=_seconds(PARSE_SECONDS)
    )
    return parsed


def _seconds(limit: int) -> int | None:
    # Checked at every call: the same function may serve the trainer's main thread and an async reward's.
    if threading.current_thread() is threading.main_thread():
        return limit
    # It warns that time-outs are off; that is meant.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return None


def _same_values(gold: Any, prediction: Any) -> bool | None:
    """Whether two expressions have equal values wherever both are real; None for what is no expression, or has none.

    Variables are real, as in math-verify: sqrt(x^2) is not x. Where the values are complex everywhere, as those of
    (-1)^n between integers, they are compared as such.
    """
    if not all(isinstance(side, sympy.Expr) and not side.has(*_NOT_SAMPLED) for side in (gold, prediction)):
        return None
    symbols = gold.free_symbols | prediction.free_symbols
    names = sorted({symbol.name for symbol in symbols})
    if isinstance(gold, sympy.Symbol) or isinstance(prediction, sympy.Symbol) or len(names) > _MAX_SYMBOLS:
        return None
    if not names and (gold.has(sympy.Float) or prediction.has(sympy.Float)):
        return None  # perhaps one is the other rounded
    at_real: list[bool] = []
    at_complex: list[bool] = []
    for point in _points(len(names)) if names else [()]:
        values = {symbol: point[names.index(symbol.name)] for symbol in symbols}
        a, b = _value(gold, values), _value(prediction, values)
        if a is None or b is None:
            continue
        scale = max(abs(a), abs(b))
        (at_real if a.is_real and b.is_real else at_complex).append(bool(abs(a - b) <= _TOLERANCE * scale))
    if not names:
        return all(at_real + at_complex) if at_real or at_complex else None
    if len(at_real) > 1 or not all(at_real):
        return all(at_real)
    return all(at_complex) if len(at_complex) > 2 else None


def _value(expression: sympy.Expr, values: dict[sympy.Symbol, sympy.Float]) -> sympy.Expr | None:
    """A finite number, or None: not defined there, or no number."""
    try:
        value = expression.xreplace(values).evalf(30)
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return None
    return (
        value
        if value.is_number and value.is_finite and (value.is_Float or value.is_Add or value.is_Mul or value.is_Integer)
        else None
    )


def _points(dimensions: int) -> Iterator[tuple[sympy.Rational, ...]]:
    """Numbers of no special relation to each other, some between 0 and 1, of both signs, the same at every call."""
    for sample, start in enumerate(_STARTS):
        yield tuple(
            sympy.Rational(*start) + sympy.Rational(k * (sample + 2), 37 + 5 * sample) for k in range(dimensions)
        )


def _has_huge_power(text: str) -> bool:
    r"""Towers (`9^{9^9}`, `2^x^y`), huge exponents, and powers of powers that come to such."""
    variables = _count_variables(text)
    of_groups, of_tokens = 1, 1  # exponents of brackets multiply those inside: ((9^{99})^{99})^{99}
    for match in _EXPONENT.finditer(text):
        exponent, end = _exponent(text, match)
        if re.search(r"\^|\*\*|!|binom", exponent) or re.match(r"\s*(?:\^|\*\*)", text[end:]):
            return True
        # Digits are counted before they are read: int() of a long run is itself quadratic.
        runs = re.findall(r"\d+", exponent)
        if any(len(run) > 4 or int(run) > (_MAX_EXPONENT if variables else _MAX_NUMERIC_EXPONENT) for run in runs):
            return True
        if sum(map(len, runs)) > _MAX_EXPONENT_DIGITS:
            return True
        if text[: match.start()].rstrip()[-1:] in tuple(_CLOSE):
            of_groups *= math.prod(max(int(run), 1) for run in runs)
        else:
            of_tokens = max(of_tokens, math.prod(max(int(run), 1) for run in runs))
    return of_groups > 1 and of_groups * of_tokens > _MAX_NUMERIC_EXPONENT


def _count_variables(text: str) -> int:
    """How many different letters stand for something unknown; at worst too many: the guard is then stricter."""
    letters = set(re.findall(r"[A-Za-z]", _COMMAND.sub(" ", text))) - {"e", "i"}
    return len(letters) + len(set(_GREEK.findall(text)))


def _exponent(text: str, match: re.Match[str]) -> tuple[str, int]:
    """The exponent after a `^`, and where it ends: a bracketed group (to the end if it never closes) or one token."""
    start = match.start("exponent")
    if text[start] not in _OPEN:
        return match["exponent"], match.end()
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        if depth == 0:
            return text[start + 1 : position], position + 1
    return text[start + 1 :], len(text)


def warm_up() -> None:
    """Make sympy and the LaTeX parser load and build what they keep; called once, before reward workers are forked."""
    symbolically_equal(r"\frac{x+1}{2}", r"\frac{1}{2}(1+x)")
