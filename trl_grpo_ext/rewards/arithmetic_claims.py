r"""Claims of the form `48 / 2 = 24` in running text, and whether they hold; in exact arithmetic, without `eval`.

A claim is two neighbouring sides of an equals sign, `a op b = c`, both of numbers only and at least one with an
operator. Of `x = 3 + 4 = 7` that is `3 + 4 = 7`; a chain `5 + 3 = 8 * 2 = 16` is two claims, of which the first is
wrong. Read are + - * / and their other forms (× · ÷ x `\times` `\cdot` `\div` `\frac{a}{b}`), parentheses, decimals,
thousands separators, currency signs, percent, and GSM8K's annotations `<<48/2=24>>`.

Rather no claim than a wrong reading: a side next to a variable, a power, a function, a unit in the middle or a word
that calculates ("half of", "dozen", "mod") is not judged. What a side may hold is bounded, so that time is linear.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from trl_grpo_ext.rewards.exact_arithmetic import Expression, NotArithmetic

MAX_TOKENS = 64  # of a side

_ANNOTATION = re.compile(r"<<([^<>\n]{1,200})>>")
_FRAC = re.compile(r"\\[dtc]?frac\s{0,4}\{([^{}]{1,80})\}\s{0,4}\{([^{}]{1,80})\}")
_BOXED = re.compile(r"\\boxed\s{0,4}\{([^{}]{1,80})\}")
# "- 5 + 3" may be a point of a list, or negative: such a dash stays, and is no sign as white space follows it
_LIST_MARK = re.compile(r"^[ \t]{0,16}(?:[*+•]|-(?![ \t]*[\d(.\\])|\(?\d{1,3}[.)])[ \t]+", re.MULTILINE)
_LATEX = re.compile(
    r"\\(?:times|cdot|ast|div|left|right)(?![a-zA-Z])|\\\\[ \t]{0,8}\n?[ \t]{0,16}(?=&?=)|\n[ \t]*(?=&?=)"
    r"|\\[$%!,;:> \\()\[\]]|\{,\}"
)
_PLAIN = {r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", r"\left": "", r"\right": "", r"\$": ""} | {
    r"\%": "%", r"\!": "", "{,}": ",", r"\\": "\n", r"\(": "\n", r"\)": "\n", r"\[": "\n", r"\]": "\n"
}  # fmt: skip
_BOLD = re.compile(r"\*\*(?=\s|$|[.,;:?)])|(?<!\S)\*\*")
_LETTER_X = re.compile(r"(?<=\d)[xX](?=\d)|(?<=[\d)%] )[xX](?= [\d(])")
_CHARACTERS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "−": "-", "–": "-", "\u00a0": " "}) | {
    ord(sign): None for sign in "$€£&"
}

_TOKEN = re.compile(
    r"""(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    |(?P<operator>\*\*|[-+*/()%])  # ** is a power, and read as no operator of ours
    |(?P<equals>(?<![<>!:=~≈≤≥])=(?![=<>~]))
    |(?P<space>[ \t]+)
    |(?P<word>[^\W\d_]+)
    |(?P<command>\\[A-Za-z]+)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_PART_OF = re.compile(r"(?:hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|sixths?|tenths?|percent|%|\d)\s{1,3}of\Z")
_CALCULATING = frozenset(
    "times plus minus over twice thrice double triple half squared cubed sqrt root log ln sin cos tan mod pmod bmod "
    "percent percentage dozen hundred thousand million billion trillion negative power factorial".split()
)
_TEXT_COMMANDS = frozenset(r"\text \textbf \textrm \mathrm \mbox".split())
_NOT_EXACT = re.compile(r"remainder|quotient|round|\brem\b|\br\b|\band \d+/")
_ARROWS = frozenset(r"\implies \Rightarrow \Longrightarrow \rightarrow \to \therefore \quad \qquad \end \begin".split())
_MAY_PRECEDE = frozenset(":;,.!?]\"'“”‘’—|→⇒∴<>≤≥≈…")  # with white space between
_MAY_OPEN = frozenset("[\"'“‘")  # without
_MAY_CLOSE = frozenset(".,;:?]}\"'”’…°")
_MAY_FOLLOW = _MAY_PRECEDE | frozenset("}°•")
_MAY_PRECEDE_NUMBER = frozenset("\n:;,.")


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of an equals sign."""

    readings: tuple[Fraction, ...]  # two where there is a percent sign: 20 % may be meant as 0.2 or as 20
    decimals: tuple[int | None, ...]  # of a single number as written; None for anything longer
    operators: int


def arithmetic_claims(text: str) -> list[bool]:
    """Whether each claim of the text holds, those of `<<...>>` annotations first.

    A side that is a single number with decimals also holds where it is the exact value rounded or cut off to as many:
    `10 / 3 = 3.33`. An integer must be exact.
    """
    if "=" not in text:
        return []
    annotations = _ANNOTATION.findall(text)
    return [
        verdict
        for part in [*annotations, _ANNOTATION.sub("", text)]
        for run, left, right in _runs(_plain(part))
        for verdict in _judged(run, left, right)
    ]


def _plain(text: str) -> str:
    """The text with one way to write each operator, and without what only dresses numbers."""
    text = _FRAC.sub(r"((\1)/(\2))", text)
    text = _BOXED.sub(r" \1 ", text)
    text = _LATEX.sub(lambda match: _PLAIN.get(match.group(), " "), text)
    text = _LIST_MARK.sub("\n", text.translate(_CHARACTERS))
    return _LETTER_X.sub("*", _BOLD.sub("", text))


_Run = list[re.Match[str]]  # tokens of numbers, operators and equals signs, with nothing else between them
_Stop = re.Match[str] | None  # what stands before or after a run


def _runs(text: str) -> Iterator[tuple[_Run, _Stop, _Stop]]:
    run: _Run = []
    left: _Stop = None
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "space":
            continue
        if token.lastgroup in ("number", "operator", "equals") and token.group() != "**":
            run.append(token)
            continue
        yield run, left, token
        run, left = [], token
    yield run, left, None


def _judged(run: _Run, left: _Stop, right: _Stop) -> Iterator[bool]:
    sides: list[_Run] = [[]]
    for token in run:
        if token.lastgroup == "equals":
            sides.append([])
        else:
            sides[-1].append(token)
    if len(sides) < 2:
        return
    sides = [side if len(side) <= MAX_TOKENS else [] for side in sides]  # an empty side is not judged
    values = [_value([token.group() for token in side]) for side in sides]
    if sides[0]:
        values[0] = _value(_without_open(sides[0])) if _may_begin(sides[0], left) else None
    if values[0] is not None and not values[0].operators and left and left.group() not in _MAY_PRECEDE_NUMBER:
        values[0] = None  # "Day 1 = 3 + 4" is a label, f(2) = 3 + 4 a function
    if sides[-1]:
        last = _without_close(sides[-1])
        values[-1] = _value(last) if last and _may_end(sides[-1][len(last) - 1], right) else None
    for one, other in itertools.pairwise(values):
        if one is not None and other is not None and one.operators + other.operators:
            yield _equal(one, other)


def _without_open(side: _Run) -> list[str]:
    """The tokens without leading parentheses that are closed somewhere behind: (5 - 3 = 2)."""
    tokens = [token.group() for token in side]
    extra = tokens.count("(") - tokens.count(")")
    while extra > 0 and tokens[0] == "(":
        tokens, extra = tokens[1:], extra - 1
    return tokens


def _without_close(side: _Run) -> list[str]:
    """The tokens without trailing parentheses that were opened somewhere before, or open a remark."""
    tokens = [token.group() for token in side]
    if tokens[-1] == "(":
        tokens.pop()
    extra = tokens.count(")") - tokens.count("(")
    while extra > 0 and tokens[-1] == ")":
        tokens.pop()
        extra -= 1
    return tokens


def _may_begin(side: _Run, stop: _Stop) -> bool:
    """Whether what stands before a side leaves its value alone."""
    first, *rest = side
    if first.group() == "-" and rest and rest[0].start() > first.end():
        return False
    if stop is None or stop.group() == "\n":
        return True
    attached = stop.end() == first.start()
    if stop.lastgroup == "word":
        word = stop.group().lower()
        if attached or len(word) == 1 or word in _CALCULATING or first.group() == "-":
            return False
        return word != "of" or not _PART_OF.search(stop.string[max(0, stop.start() - 24) : stop.end()].lower())
    if stop.lastgroup == "command":
        return stop.group() in _ARROWS
    if first.group() == "-" and stop.group() not in ":;,":
        return False
    return stop.group() in (_MAY_OPEN if attached else _MAY_PRECEDE)


def _may_end(last: re.Match[str], stop: _Stop) -> bool:
    """Whether what stands after a side leaves its value alone."""
    if stop is None:
        return True
    attached = stop.start() == last.end()
    behind = stop.string[stop.end() : stop.end() + 24]
    if _NOT_EXACT.search(stop.string[stop.start() : stop.end() + 48].lower()):
        return False
    if stop.group() == "\n":
        return True
    if stop.lastgroup == "word":
        word = stop.group().lower()
        return not attached and len(word) > 1 and word not in _CALCULATING
    if stop.lastgroup == "command":
        unit = re.findall(r"[a-z]+", behind.lower())[:1]
        return stop.group() in _ARROWS or (stop.group() in _TEXT_COMMANDS and not _CALCULATING.intersection(unit))
    if attached and (behind[:1].isdigit() or behind[:1] == "\\"):  # 3,5 or 1.2.3 or 0.\overline{3}
        return False
    return stop.group() in (_MAY_CLOSE if attached else _MAY_FOLLOW)


def _value(tokens: Sequence[str]) -> _Side | None:
    if not tokens:
        return None
    factors = [Fraction(1, 100), Fraction(1)] if "%" in tokens else [Fraction(1)]
    try:
        expressions = [Expression(tokens, factor) for factor in factors]
        readings = tuple(expression.value() for expression in expressions)
    except NotArithmetic:
        return None
    number = tokens[1] if tokens[0] == "-" and len(tokens) > 1 else tokens[0]
    places: list[int | None] = [None] * len(factors)
    if expressions[0].numbers == 1 and expressions[0].operators == 0:
        written = len(number.partition(".")[2])
        places = [written + 2 * (factor != 1) for factor in factors]
    return _Side(readings, tuple(places), expressions[0].operators)


def _equal(one: _Side, other: _Side) -> bool:
    return any(
        x == y or _is_rounded(x, y, dy) or _is_rounded(y, x, dx)
        for x, dx in zip(one.readings, one.decimals, strict=True)
        for y, dy in zip(other.readings, other.decimals, strict=True)
    )


def _is_rounded(exact: Fraction, stated: Fraction, decimals: int | None) -> bool:
    """Whether `stated`, written with so many decimals, is `exact` rounded or cut off to them."""
    if not decimals:
        return False
    error = abs(exact) - abs(stated) if exact * stated >= 0 else abs(exact) + abs(stated)
    step = Fraction(1, 10**decimals)
    return -step / 2 <= error < step
