r"""Answers as exact numbers: `1,234.50`, `-3/4`, `\frac{1}{2}`, `2 1/2`, `$5`, `50\%`, `12 apples`, `1.5 \times 10^3`.

Exact rational arithmetic (`fractions.Fraction`), never floats. Sizes are bounded before any arithmetic: at most
`MAX_DIGITS` digits in all and decimal exponents of two digits, so no input can blow up in time or memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 64
_ROUNDING = Fraction(1, 10**5)  # closer than this, relatively: perhaps one is the other rounded; not for us to say

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_POWER_OF_TEN = r"(?:[eE](?P<e>[+-]?\d{1,2})|\s*(?:\\times|\\cdot|\*|×)\s*10\s*(?:\^|\*\*)\s*\{?(?P<p>[+-]?\d{1,2})\}?)"
_PART = rf"(?:\{{\s*([+-]?\s*{_DECIMAL})\s*\}}|(\d))"  # the {12} or bare 1 of a \frac
_FRAC = rf"\\frac\s*{_PART}\s*{_PART}"
_SIGNED = r"(?P<sign>[+-]?)\s*"
_TAIL = r"\s*(?P<percent>%|percent\b)?\s*(?P<unit>(?:(?<=[\s%\d])[A-Za-z][A-Za-z '/²³-]*(?:\^?\{?[23]\}?)?)?)"

_WHOLE_AND_FRACTION = re.compile(rf"{_SIGNED}(?P<whole>\d+)\s+(?P<num>\d+)\s*/\s*(?P<den>\d+){_TAIL}")
_WHOLE_AND_FRAC = re.compile(rf"{_SIGNED}(?P<whole>\d+)?\s*{_FRAC}{_TAIL}")
_RATIO = re.compile(rf"{_SIGNED}(?P<num>{_DECIMAL})\s*/\s*(?P<den>{_DECIMAL}){_TAIL}")
_PLAIN = re.compile(rf"{_SIGNED}(?P<num>{_DECIMAL}){_POWER_OF_TEN}?{_TAIL}")

_UNWRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_REPLACEMENTS = (
    (re.compile("[\u2212\u2012\u2013\uff0d]"), "-"),
    (re.compile("[\u00a0\u2009\u202f\u2007~]"), " "),
    (re.compile(r"\\[!]\s*"), ""),  # negative thin space: `32,\! 349` is how MATH writes 32,349
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:[,;:> ]|quad\b|qquad\b)"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°"), " degrees"),
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_NOT_UNITS = frozenset(
    "hundred thousand million billion trillion dozen half pi or and to plus minus times am pm".split()
)
_UNITS_WITHOUT_SPACE = frozenset("cm mm km kg mg ml ft lb lbs oz mph kmh hr hrs min cents usd".split())


@dataclass(frozen=True)
class Quantity:
    """A number as an answer states it; `value` is the number before any percent sign (50 for 50 %)."""

    value: Fraction
    is_percent: bool
    unit: str


def normalise(text: str) -> str:
    r"""The answer without what only dresses it: math delimiters, `\text{}`, bold, spacing, a final full stop."""
    text = text.strip().rstrip(".,;").strip()
    for opening, closing in _DELIMITERS:
        inside = text[len(opening) : -len(closing)] if len(text) > len(opening) + len(closing) else ""
        if inside and text.startswith(opening) and text.endswith(closing) and opening not in inside:
            text = inside.strip()
    text = _UNWRAPPED.sub(r" \1 ", text)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(".,;").rstrip()


def parse_quantity(text: str) -> Quantity | None:
    """The number that a whole (normalised) text states, or None if it is anything else or too long."""
    text = re.sub(r"\\?[$€£¥]\s*", "", text).strip()
    if sum(character.isdigit() for character in text) > MAX_DIGITS:
        return None
    for pattern, value_of in _FORMS:
        match = pattern.fullmatch(text)
        if match:
            value = value_of(match)
            unit = _unit(match, text)
            return None if value is None or unit is None else Quantity(value, bool(match["percent"]), unit)
    return None


def same_quantity(gold: Quantity, prediction: Quantity) -> bool | None:
    """Whether two numbers are equal; None where exact arithmetic should not decide.

    A percent sign on one side only matches both readings, 50 % = 50 and 50 % = 0.5: datasets hold either. A unit on
    one side only is ignored. Undecided: equal values with two different units, and values so close that one may be
    the other rounded.
    """
    equal = gold.value == prediction.value
    if gold.is_percent != prediction.is_percent:
        percent, bare = (gold, prediction) if gold.is_percent else (prediction, gold)
        equal = equal or percent.value / 100 == bare.value
    if gold.unit and prediction.unit and gold.unit != prediction.unit:
        return None
    if equal:
        return True
    return None if abs(gold.value - prediction.value) <= _ROUNDING * abs(gold.value) else False


def _unit(match: re.Match[str], text: str) -> str | None:
    """The unit words after the number in comparable form, "" without any, None if they are not a unit."""
    unit = match["unit"].strip().lower()
    words = re.findall(r"[a-z]+", unit)
    attached = bool(words) and text[match.start("unit") - 1].isdigit()
    if attached and words[0] not in _UNITS_WITHOUT_SPACE:
        return None  # 5x, 2pi: a product
    if len(words) > 4 or any(len(word) < 2 or word in _NOT_UNITS for word in words):
        return None
    return re.sub(r"s\b|[\^{}]", "", unit)


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match["sign"] == "-" else value


def _decimal(text: str) -> Fraction:
    text = re.sub(r"[, ]", "", text)
    return Fraction(text.rstrip(".") if text.endswith(".") else text)


def _whole_and_fraction(match: re.Match[str]) -> Fraction | None:
    numerator, denominator = Fraction(match["num"]), Fraction(match["den"])
    return _signed(match, Fraction(match["whole"]) + numerator / denominator) if denominator else None


def _whole_and_frac(match: re.Match[str]) -> Fraction | None:
    parts = [part for part in match.groups()[2:6] if part is not None]
    numerator, denominator = (_decimal(part) for part in parts)
    return _signed(match, Fraction(match["whole"] or 0) + numerator / denominator) if denominator else None


def _ratio(match: re.Match[str]) -> Fraction | None:
    denominator = _decimal(match["den"])
    return _signed(match, _decimal(match["num"]) / denominator) if denominator else None


def _plain(match: re.Match[str]) -> Fraction | None:
    return _signed(match, _decimal(match["num"]) * Fraction(10) ** int(match["e"] or match["p"] or 0))


_FORMS = (
    (_WHOLE_AND_FRACTION, _whole_and_fraction),
    (_WHOLE_AND_FRAC, _whole_and_frac),
    (_RATIO, _ratio),
    (_PLAIN, _plain),
)
