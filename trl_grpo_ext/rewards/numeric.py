r"""Answers as exact numbers: `1,234.50`, `-3/4`, `\frac{1}{2}`, `2 1/2`, `$5`, `50\%`, `12 apples`, `1.5 \times 10^3`.

Exact rational arithmetic (`fractions.Fraction`), never floats. Sizes are bounded before any arithmetic: at most
`MAX_DIGITS` digits in all and decimal exponents of two digits, so no input can blow up in time or memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from trl_grpo_ext.rewards.notation import words_kept

MAX_DIGITS = 64
_ROUNDING = Fraction(1, 10**5)  # closer than this, relatively: perhaps one is the other rounded; not for us to say
_MIN_DECIMALS = 2  # a gold answer with fewer is not taken for a rounded one

_DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_POWER_OF_TEN = (
    r"(?:[eE](?P<e>[+-]?\d{1,2})|\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*[({]?(?P<p>[+-]?\d{1,2})[)}]?)"
)
_PART = rf"(?:\{{\s*([+-]?\s*{_DECIMAL})\s*\}}|(\d))"  # the {12} or bare 1 of a \frac
_FRAC = rf"\\frac\s*{_PART}\s*{_PART}"
_SIGNED = r"(?P<sign>[+-]?)\s*"
_TAIL = (
    r"\s*(?P<percent>%|percent\b)?\s*(?P<unit>(?:(?<=[\s%\d])[A-Za-z][A-Za-z '/-]*)?)\s*(?P<power>(?:\^?\{?[23]\}?)?)"
)

_WHOLE_AND_FRACTION = re.compile(rf"{_SIGNED}(?P<whole>\d+)\s+(?P<num>\d+)\s*/\s*(?P<den>\d+){_TAIL}")
_WHOLE_AND_FRAC = re.compile(rf"{_SIGNED}(?P<whole>\d+)?\s*{_FRAC}{_TAIL}")
_RATIO = re.compile(rf"{_SIGNED}(?P<num>{_DECIMAL})\s*[/:]\s*(?P<den>{_DECIMAL}){_TAIL}")
_REPEATING = re.compile(rf"{_SIGNED}(?P<whole>\d*)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s*\{{(?P<cycle>\d+)\}}{_TAIL}")
_PLAIN = re.compile(rf"{_SIGNED}(?P<num>{_DECIMAL}){_POWER_OF_TEN}?{_TAIL}")
_DECIMAL_COMMA = re.compile(r"[+-]?(?:\d+,\d{1,2}|0,\d+|\d+,\d{4,})")  # 3,14 and 0,125, but not 1,234

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NOT_UNITS = frozenset(
    "half pi or and to plus minus times by not infinity mod choose base sin cos tan cot sec csc log ln exp sqrt".split()
)
_UNITS_WITHOUT_SPACE = frozenset("cm mm km kg mg ml ft lb oz mph kmh hr min cent usd am pm degree".split())
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen"}
_MEASURES: dict[str, dict[str, str]] = {  # what is measured: size -> the unit's names
    "time": {"1": "second sec", "60": "minute min", "3600": "hour hr", "86400": "day", "604800": "week"},
    "years": {"1": "month", "12": "year yr"},
    "length": {"1": "mm millimeter millimetre", "10": "cm centimeter centimetre", "1000": "meter metre",
               "1000000": "km kilometer kilometre", "25.4": "inch", "304.8": "foot ft", "914.4": "yard yd",
               "1609344": "mile"},
    "mass": {"1": "mg milligram", "1000": "gram", "1000000": "kg kilogram", "28349.523125": "ounce oz",
             "453592.37": "pound lb"},
    "volume": {"1": "ml milliliter millilitre", "1000": "liter litre", "3785.411784": "gallon"},
    "money": {"1": "cent", "100": "dollar usd"},
    "euros": {"1": "euro eur"},
    "pounds": {"1": "sterling"},
    "yens": {"1": "yen"},
    "morning": {"1": "am"},
    "evening": {"1": "pm"},
    "angle": {"1": "degree"},
}  # fmt: skip
_UNITS = {
    name: (measure, Fraction(size))
    for measure, sizes in _MEASURES.items()
    for size, names in sizes.items()
    for name in names.split()
}
_LETTER_UNITS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "l": "liter", "L": "liter"}
_LETTER_UNIT = re.compile(r"\\text\{\s*([mgshlL])\s*\}")  # elsewhere a letter is a variable
_PLURALS = {"feet": "foot", "inches": "inch"}


@dataclass(frozen=True)
class Quantity:
    """A number as an answer states it; `value` is the number before any percent sign (50 for 50 %).

    `decimals` is how many decimal places it is written with, None for a fraction, a percentage or a power of ten.
    """

    value: Fraction
    is_percent: bool
    unit: tuple[str, ...]
    decimals: int | None = None


@lru_cache(maxsize=4096)
def parse_quantity(text: str) -> Quantity | None:
    """The number that a whole (normalised) text states, or None if it is anything else or too long."""
    if sum(character.isdigit() for character in text) > MAX_DIGITS:
        return None
    text = _LETTER_UNIT.sub(lambda match: f" {_LETTER_UNITS[match[1]]} ", text)
    text = words_kept(text).replace(r"^\circ", " degrees ").replace(r"\$", "$")
    currency = re.search(r"[$€£¥]", text)
    text = " ".join(re.sub(r"[$€£¥]", "", text).split())
    for pattern, value_of in _FORMS:
        match = pattern.fullmatch(text)
        if match:
            value, unit = value_of(match), _unit(match, text)
            if value is None or unit is None:
                return None
            scale, words = unit
            if currency and not words:
                words = (_CURRENCIES[currency[0]],)
            return Quantity(value * scale, bool(match["percent"]), words, _decimals(match) if scale == 1 else None)
    return None


def is_unit(word: str) -> bool:
    """Whether a word is a unit of measurement that we know: `feet`, `kg`."""
    return _singular(word.lower()) in _UNITS


def same_number(gold: str, prediction: str) -> bool | None:
    """Whether two (normalised) texts state the same number; None where one is no number, or it is not for us to say.

    `3,14` is read as a decimal comma if the other text has a decimal point, else it is a list of two.
    """
    quantities = [parse_quantity(text) for text in (gold, prediction)]
    if quantities.count(None) == 1:
        missing = quantities.index(None)
        text, other = (gold, prediction) if missing == 0 else (prediction, gold)
        if _DECIMAL_COMMA.fullmatch(text) and "." in other:
            quantities[missing] = parse_quantity(text.replace(",", "."))
    a, b = quantities
    return None if a is None or b is None else same_quantity(a, b)


def same_quantity(gold: Quantity, prediction: Quantity) -> bool | None:
    """Whether two numbers are equal; None where exact arithmetic should not decide.

    A percent sign on one side only matches both readings, 50 % = 50 and 50 % = 0.5: datasets hold either. A unit on
    one side only is ignored, and so are words that are no unit of measurement; two units of the same kind are
    converted (2 hours = 120 minutes), two of different kinds are never equal. A gold decimal of at least two places
    equals the fraction without a finite decimal form that rounds to it (6.67 and 20/3), not the reverse. Undecided:
    values so close that one may be the other rounded.
    """
    sizes = _sizes(gold.unit, prediction.unit)
    if sizes is None:
        return False
    a, b = gold.value * sizes[0], prediction.value * sizes[1]
    if a == b:
        return True
    if gold.is_percent != prediction.is_percent and (a / 100 == b if gold.is_percent else b / 100 == a):
        return True
    if not gold.is_percent and not prediction.is_percent and rounds_to(gold, b) and not _is_finite_decimal(b):
        return True
    if gold.decimals == prediction.decimals == 0:
        return False
    return None if abs(a - b) <= _ROUNDING * abs(a) else False


def rounds_to(gold: Quantity, value: Fraction) -> bool:
    """Whether a gold decimal is this value, rounded or cut off to as many places (at least two)."""
    if gold.decimals is None or gold.decimals < _MIN_DECIMALS:
        return False
    last_place = Fraction(1, 10**gold.decimals)
    return abs(gold.value - value) <= last_place / 2 or 0 <= abs(value) - abs(gold.value) < last_place


def _is_finite_decimal(value: Fraction) -> bool:
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _sizes(gold: tuple[str, ...], prediction: tuple[str, ...]) -> tuple[Fraction, Fraction] | None:
    """What to multiply both values with to have them in one unit; None if no factors can do that."""
    one = Fraction(1)
    a, b = (next((word for word in words if word in _UNITS), None) for words in (gold, prediction))
    if a is None or b is None or a == b:
        return one, one
    (measure_a, size_a), (measure_b, size_b) = _UNITS[a], _UNITS[b]
    if measure_a == measure_b and len(gold) == len(prediction) == 1:
        return size_a, size_b
    return (one, one) if measure_a == measure_b and size_a == size_b else None


def _unit(match: re.Match[str], text: str) -> tuple[int, tuple[str, ...]] | None:
    """The scale (million) and the unit words after the number, in comparable form; None if they are no unit."""
    words = re.findall(r"[a-z]+", match["unit"].lower())
    attached = bool(words) and text[match.start("unit") - 1].isdigit()
    scale = 1
    while words and words[0] in _SCALES:
        scale *= _SCALES[words.pop(0)]
    words = [_singular(word) for word in words]
    if attached and scale == 1 and (not words or words[0] not in _UNITS_WITHOUT_SPACE):
        return None  # 5x, 2pi: a product
    if len(words) > 4 or (words and len(words[0]) < 3 and words[0] not in _UNITS):
        return None  # 3 ab is a product too
    if any(word in _NOT_UNITS or word in _SCALES for word in words) or (match["power"] and not words):
        return None
    return scale, (*words, *(["power"] if match["power"] else []))


def _singular(word: str) -> str:
    if word in _UNITS or word in _PLURALS:
        return _PLURALS.get(word, word)
    return word.removesuffix("s")


def _decimals(match: re.Match[str]) -> int | None:
    if match.re is not _PLAIN or match["e"] or match["p"] or match["percent"]:
        return None
    return len(match["num"].partition(".")[2])


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match["sign"] == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[, ]", "", text).rstrip("."))


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


def _repeating(match: re.Match[str]) -> Fraction | None:
    fixed, cycle = match["fixed"], match["cycle"]
    tail = Fraction(int(cycle), 10 ** len(cycle) - 1) / 10 ** len(fixed)
    return _signed(match, Fraction(f"{match['whole'] or 0}.{fixed or 0}") + tail)


def _plain(match: re.Match[str]) -> Fraction | None:
    return _signed(match, _decimal(match["num"]) * Fraction(10) ** int(match["e"] or match["p"] or 0))


_FORMS = (
    (_WHOLE_AND_FRACTION, _whole_and_fraction),
    (_WHOLE_AND_FRAC, _whole_and_frac),
    (_RATIO, _ratio),
    (_REPEATING, _repeating),
    (_PLAIN, _plain),
)
