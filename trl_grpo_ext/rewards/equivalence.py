r"""Whether two answers are the same: as text, as exact numbers, part by part, and at last symbolically (math-verify).

The rules in the middle take an answer apart where its form is plain, `(1, 2)`, `a = 1, b = 2`, `1 \pm \sqrt{2}`,
`x < 3`, so that the parts are compared by the cheap and exact means, and the symbolic stage gets what is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import product

from trl_grpo_ext.rewards.answer_parts import (
    MAX_ITEMS,
    column_rows,
    distinct,
    equation_sides,
    items,
    label,
    last_value,
    matrix_rows,
    renamed,
    tuple_entries,
    without_conditions,
    without_subscripts,
)
from trl_grpo_ext.rewards.formulas import is_prose
from trl_grpo_ext.rewards.notation import nesting, normalise, squeezed, words_dropped, words_kept
from trl_grpo_ext.rewards.numeric import parse_quantity, rounds_to, same_number
from trl_grpo_ext.rewards.regions import Piece, parse_region
from trl_grpo_ext.rewards.symbolic import MAX_NESTING, numeric_value, symbolically_equal

COMPARISONS = ("text", "number", "symbolic")
_MAX_SYMBOLIC_CALLS = 12  # for one pair of answers; each is bounded, so that the pair is too
_ENDLESS = 20  # decimals with as many digits have no end
_FINE = Decimal("0.005")  # relatively, of what `\approx` joins, where no decimal places say how it was rounded
_SLIP = Decimal("0.05")  # relatively: what is farther off is no slip in rounding

_IN_BASE = re.compile(r"([\dA-F]+)_\{?(\d+)\}?")
_INTEGER_LETTERS = frozenset("klmn")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_FUNCTION = re.compile(r"(?P<name>[A-Za-z])\s*\(\s*(?P<argument>[A-Za-z])\s*\)\s*=(?P<body>.*)")
_CHOICE = re.compile(
    r"\(?([A-J])\)?|\(([A-J])\)(?!.*\([A-J]\))\s*\S.*|([A-J])(?:[):]|\.(?=\s))(?!.*(?<![A-Za-z])[A-J][).:])\s*\S.*"
)


def answers_match(gold: str, prediction: str, compare: Sequence[str] = COMPARISONS) -> bool:
    r"""Whether two extracted answers are the same, by the comparisons named in `compare`, the cheapest first.

    "text": white space, math delimiters and `\text{}` do not count, nor does the case of words. "number": see
    `numeric.same_quantity`; with it also come the rules that compare lists, tuples, intervals and the like part by
    part. Two numbers that differ are not handed on. "symbolic": math-verify; sentences are not searched for something
    to parse.
    """
    gold, prediction = normalise(gold), normalise(prediction)
    if nesting(gold) > MAX_NESTING or nesting(prediction) > MAX_NESTING:
        return bool(squeezed(gold)) and squeezed(gold) == squeezed(prediction)
    if squeezed(gold) == squeezed(prediction):
        return bool(squeezed(gold))
    matcher = _Matcher("number" in compare, _MAX_SYMBOLIC_CALLS if "symbolic" in compare else 0)
    return matcher.same(without_conditions(gold), without_conditions(prediction))


def same_text(gold: str, prediction: str) -> bool:
    """The first of the comparisons alone."""
    gold, prediction = squeezed(normalise(gold)), squeezed(normalise(prediction))
    return bool(gold) and gold == prediction


@dataclass
class _Matcher:
    """One pair of answers being compared; counts the symbolic comparisons that its parts may still take."""

    numbers: bool
    symbolic_calls_left: int

    def same(self, gold: str, prediction: str) -> bool:
        """Whether the two are equal by the first comparison that can say so."""
        if squeezed(gold) == squeezed(prediction):
            return bool(squeezed(gold))
        if self.numbers:
            for rule in _RULES:
                verdict = rule(self, gold, prediction)
                if verdict is not None:
                    return verdict
        elif is_prose(words_dropped(gold)) or is_prose(words_dropped(prediction)):
            return False
        return self.symbolic(gold, prediction)

    def symbolic(self, gold: str, prediction: str) -> bool:
        """Whether math-verify finds them equal, as long as calls are left."""
        if self.symbolic_calls_left == 0:
            return False
        self.symbolic_calls_left -= 1
        return symbolically_equal(words_dropped(gold), words_dropped(prediction))

    def value(self, text: str) -> Decimal | None:
        """What a text is worth as a number, however it is written; this takes math-verify's parser, too."""
        quantity = parse_quantity(text)
        if quantity is not None:
            return Decimal(quantity.value.numerator) / Decimal(quantity.value.denominator)
        if self.symbolic_calls_left == 0:
            return None
        self.symbolic_calls_left -= 1
        return numeric_value(words_dropped(text))

    def in_order(self, gold: Sequence[str], prediction: Sequence[str]) -> bool:
        """Whether two lists are equal, member by member."""
        return len(gold) == len(prediction) and all(self.same(a, b) for a, b in zip(gold, prediction, strict=True))

    def in_any_order(self, gold: Sequence[str], prediction: Sequence[str]) -> bool:
        """Whether two lists have equal members, each used once."""
        if len(gold) != len(prediction):
            gold, prediction = distinct(gold), distinct(prediction)  # as sets: {1, 1, 2} is {1, 2}
        if len(gold) != len(prediction) or len(gold) > MAX_ITEMS:
            return False
        left = list(prediction)
        for item in gold:
            found = next((other for other in left if squeezed(other) == squeezed(item)), None)
            if found is None:
                found = next((other for other in left if self.same(item, other)), None)
            if found is None:
                return False
            left.remove(found)
        return True


# Each rule says True, False, or None where it has nothing to say about answers of this form.


def _numbers(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    return same_number(gold, prediction)


def _choice(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    """`(B)`, `B`, `B. Paris`: the letter of an option counts, if either side is nothing but that."""
    texts = [words_kept(text) for text in (gold, prediction)]
    letters = [_CHOICE.fullmatch(text) for text in texts]
    if None in letters or not any(len(text) <= 3 for text in texts):
        return None
    a, b = ({letter for letter in match.groups() if letter} for match in letters if match)
    return a == b


def _approximation(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    r"""`\sqrt{2} \approx 1.41`: either of the two values, if one is the other rounded (`3 \approx 4` are guesses)."""
    if r"\approx" not in gold and r"\approx" not in prediction:
        return None
    return any(matcher.same(a, b) for a, b in product(_approximated(matcher, gold), _approximated(matcher, prediction)))


def _approximated(matcher: _Matcher, text: str) -> list[str]:
    """The values that a text with at most one `approx` sign may be taken for; none if they are too far apart."""
    parts = [part.strip() for part in text.split(r"\approx") if part.strip()]
    texts = [last_value(part) for part in parts]
    known = [number for number in map(matcher.value, texts) if number is not None] if len(parts) == 2 else []
    if len(known) < 2:  # of `x \approx 1.41`, one
        return parts if len(parts) < 3 else []
    quantities = [parse_quantity(text) for text in texts]
    places = [quantity.decimals if quantity else None for quantity in quantities]
    written = [count for count in places if count is not None]
    unit = Decimal(10) ** -min(written) if written else _FINE * abs(known[0])
    difference = abs(known[0] - known[1])
    if difference < unit:
        return parts
    exact = [part for part, count in zip(parts, places, strict=True) if count is None]
    # Rounded badly: \frac{19}{6} \approx 3.2 means the fraction
    return exact if len(exact) == 1 and difference <= _SLIP * abs(known[0]) else []


def _angle(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    r"""`30^\circ` and `\pi/6`."""
    for degrees, radians in ((gold, prediction), (prediction, gold)):
        quantity = parse_quantity(degrees)
        if quantity and quantity.unit == ("degree",) and r"\pi" in radians and r"\circ" not in radians:
            turned = quantity.value / 180
            return matcher.symbolic(last_value(radians), rf"\frac{{{turned.numerator} \pi}}{{{turned.denominator}}}")
    return None


def _function(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    """`f(x) = x + 1` and `f(t) = t + 1`: the name of the argument does not count."""
    a, b = _FUNCTION.fullmatch(gold), _FUNCTION.fullmatch(prediction)
    if not a or not b or a["name"] != b["name"]:
        return None
    return matcher.same(a["body"].strip(), renamed(b["body"], b["argument"], a["argument"]).strip())


def _parameter(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    r"""`\frac{\pi}{6} + 2 \pi k` and `\frac{\pi}{6} + 2 \pi n`: the name of an integer does not count."""
    a, b = (set(_LETTER.findall(words_dropped(text))) for text in (gold, prediction))
    only_a, only_b = a - b, b - a
    if len(only_a) != 1 or len(only_b) != 1 or r"\pi" not in gold or r"\pi" not in prediction:
        return None
    if not (only_a | only_b) <= _INTEGER_LETTERS:
        return None
    return matcher.same(gold, renamed(prediction, only_b.pop(), only_a.pop()))


def _base(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    """`204_5`: the digits and the base, if both name one."""
    a, b = _IN_BASE.fullmatch(squeezed(gold)), _IN_BASE.fullmatch(squeezed(prediction))
    return a.groups() == b.groups() if a and b else None


def _matrix(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    """Entry by entry; a column is the same as the tuple of its entries."""
    a, b = matrix_rows(gold), matrix_rows(prediction)
    if a is None and b is None:
        return None
    a = a or column_rows(gold)
    b = b or column_rows(prediction)
    if a is None or b is None:
        return None
    return len(a) == len(b) and all(matcher.in_order(row, other) for row, other in zip(a, b, strict=True))


def _region(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    """Intervals and inequalities, where there is more to them than two pairs in brackets."""
    a, b = parse_region(gold), parse_region(prediction)
    if a is None or b is None or (a.variable and b.variable and a.variable != b.variable):
        return None
    if not (a.is_relation or b.is_relation or len(a.pieces) > 1 or len(b.pieces) > 1):
        return None
    if len(a.pieces) != len(b.pieces):
        return None

    def same(piece: Piece, other: Piece) -> bool:
        brackets = piece.opening == other.opening and piece.closing == other.closing
        return brackets and matcher.same(piece.low, other.low) and matcher.same(piece.high, other.high)

    left = list(b.pieces)
    for piece in a.pieces:
        found = next((other for other in left if same(piece, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _list(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    r"""`1, 2 and 3`, `\{3, 2, 1\}`, `x = 1, y = 2`, `\pm 1`: in any order, names only where both sides have them."""
    a, b = items(gold), items(prediction)
    if len(a) < 2 and len(b) < 2:
        return None
    inside = tuple_entries(gold) if len(a) < 2 else tuple_entries(prediction) if len(b) < 2 else None
    if inside is not None:
        return matcher.in_order(a, inside) if len(b) < 2 else matcher.in_order(inside, b)
    names_a, names_b = ([label(item) for item in members] for members in (a, b))
    if any(names_a) != any(names_b):
        a, b = [last_value(item) for item in a], [last_value(item) for item in b]
        if None not in names_a and len({without_subscripts(str(name)) for name in names_a}) == len(a):
            return matcher.in_order(a, b)  # gold names all of them, the prediction none: it must keep their order
    if matcher.in_any_order(a, b):
        return True
    if len(a) == 1 or len(b) == 1:  # perhaps two forms of the same: `1\frac{1}{2}` or `\frac{3}{2}`
        return all(matcher.same(item, other) for item, other in product(a, b))
    are_numbers = all(parse_quantity(item) is not None for item in (*a, *b))
    return False if are_numbers or len(a) > MAX_ITEMS or len(b) > MAX_ITEMS else None


def _tuple(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    """`(1, 2)`: in this order, and for pairs, which may be intervals, with the same brackets."""
    a, b = tuple_entries(gold), tuple_entries(prediction)
    if a is None or b is None:
        return None
    if len(a) != len(b):
        return False
    if len(a) == 2 and (gold[0], gold[-1]) != (prediction[0], prediction[-1]):
        return False
    if matcher.in_order(a, b):
        return True
    return False if all(parse_quantity(item) is not None for item in (*a, *b)) else None


def _named(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    r"""`x = 5` and `5`, `x \in [0, 1]` and `[0, 1]`, `2 + 3 = 5` and `5`; but not `2x = 5` and `5`."""
    a, b = label(gold, strict=True), label(prediction)
    has_a, has_b = (len(equation_sides(text)) > 1 for text in (gold, prediction))
    if has_a and has_b:
        sides = [squeezed(equation_sides(text)[0]) for text in (gold, prediction)]
        return matcher.same(last_value(gold), last_value(prediction)) if sides[0] == sides[1] else None
    if has_a:
        return matcher.same(last_value(gold), prediction) if a is not None else None
    if has_b:
        return matcher.same(gold, last_value(prediction)) if b is not None else False
    return None


def _rounded(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    r"""A gold decimal and an exact prediction: `41.49` and `17 + 10\sqrt{6}`."""
    quantity = parse_quantity(gold)
    if quantity is None or not re.search(r"\\sqrt|\\pi|\\log|\\ln|\\frac|/", prediction):
        return None
    value = matcher.value(prediction)
    if value is None or len(value.normalize().as_tuple().digits) < _ENDLESS:
        return None
    return rounds_to(quantity, Fraction(value)) or None


def _prose(matcher: _Matcher, gold: str, prediction: str) -> bool | None:
    """math-verify would search a sentence for anything to parse, and multiply the letters of a word."""
    formulas = [words_dropped(text) for text in (gold, prediction)]
    are_words = all(re.fullmatch(r"[A-Za-z]{3,}", text) for text in formulas)
    return False if are_words or any(is_prose(text) for text in formulas) else None


_RULES: tuple[Callable[[_Matcher, str, str], bool | None], ...] = (
    _numbers, _choice, _approximation, _angle, _function, _parameter, _base, _matrix, _region, _list, _tuple, _named,
    _rounded, _prose,
)  # fmt: skip
