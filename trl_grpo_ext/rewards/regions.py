r"""Sets of real numbers as answers state them: `(2, 5]`, `2 < x \le 5`, `x < 1 or x = 3`, `\{x | x > 0\}`, unions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trl_grpo_ext.rewards.notation import split_top, squeezed, words_dropped

_UNION = re.compile(r"\\cup(?![A-Za-z])")
_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee|cup)(?![A-Za-z])")
_RELATION = re.compile(r"(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\neq(?![A-Za-z])|=)")
_VARIABLE = re.compile(r"(?:[A-Za-df-z]|\\(?!pi|infty)[A-Za-z]+)(?:_(?:\w|\{\w+\}))?")
_SET_BUILDER = re.compile(
    r"\\\{\s*(?P<name>[A-Za-z])\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*)?R\s*\}?\s*)?[|:](?P<rule>.*)\\\}"
)
_MEMBER = re.compile(rf"(?P<name>{_VARIABLE.pattern})\s*\\in(?![A-Za-z])(?P<of>.*)")
_INTERVAL = re.compile(r"(?P<opening>[(\[])(?P<ends>.*)(?P<closing>[)\]])")
_COMMA = re.compile(r"[,;]")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\neq": r"\neq"}
_MINUS_INFINITY, _INFINITY = r"-\infty", r"\infty"


@dataclass(frozen=True)
class Piece:
    """An interval, its ends as text; a single number `a` is `[a, a]`."""

    opening: str
    low: str
    high: str
    closing: str


@dataclass(frozen=True)
class Region:
    """A union of intervals; `variable` is whose values they are, if the answer says so."""

    pieces: tuple[Piece, ...]
    variable: str | None = None
    is_relation: bool = False  # stated by inequalities


def parse_region(text: str) -> Region | None:
    """The set of numbers that a (normalised) text states as intervals or inequalities; None if it does neither."""
    text = words_dropped(text)
    builder = _SET_BUILDER.fullmatch(text)
    if builder:
        inside = _from_relations(builder["rule"])
        return inside if inside and inside.variable == builder["name"] else None
    member = _MEMBER.fullmatch(text)
    if member:
        inside = parse_region(member["of"].strip())
        return Region(inside.pieces, squeezed(member["name"])) if inside and inside.variable is None else None
    return _from_intervals(text) or _from_relations(text)


def _from_intervals(text: str) -> Region | None:
    pieces: list[Piece] = []
    for part in split_top(text, _UNION):
        points = re.fullmatch(r"\\\{(.*)\\\}", part)
        if points:
            pieces += [Piece("[", point, point, "]") for point in split_top(points[1], _COMMA)]
            continue
        interval = _INTERVAL.fullmatch(part)
        ends = split_top(interval["ends"], _COMMA) if interval else []
        if interval is None or len(ends) != 2:
            return None
        pieces.append(Piece(interval["opening"], ends[0], ends[1], interval["closing"]))
    return Region(tuple(pieces)) if pieces else None


def _from_relations(text: str) -> Region | None:
    pieces: list[Piece] = []
    variables = set()
    for part in split_top(text, _OR):
        solved = _solved(part)
        if solved is None:
            return None
        variables.add(squeezed(solved[0]))
        pieces += solved[1]
    return Region(tuple(pieces), variables.pop(), is_relation=True) if len(variables) == 1 else None


def _solved(relation: str) -> tuple[str, list[Piece]] | None:
    """`2 < x <= 5` or `x != 3` as the variable and its intervals."""
    terms = [term.strip() for term in _RELATION.split(relation)]
    if len(terms) == 3:
        left, sign, right = terms
        if _VARIABLE.fullmatch(right) and not _VARIABLE.fullmatch(left):
            left, sign, right = right, _FLIPPED[sign], left
        if not right or not _VARIABLE.fullmatch(left) or _VARIABLE.fullmatch(right):
            return None
        return left, [Piece(*ends) for ends in _ONE_SIDED[sign](right)]
    if len(terms) == 5:
        low, below, name, above, high = terms
        if below in (">", r"\ge"):
            low, below, above, high = high, _FLIPPED[above], _FLIPPED[below], low
        if not (low and high) or {below, above} - {"<", r"\le"} or not _VARIABLE.fullmatch(name):
            return None
        return name, [Piece("(" if below == "<" else "[", low, high, ")" if above == "<" else "]")]
    return None


_ONE_SIDED = {
    "<": lambda end: [("(", _MINUS_INFINITY, end, ")")],
    r"\le": lambda end: [("(", _MINUS_INFINITY, end, "]")],
    ">": lambda end: [("(", end, _INFINITY, ")")],
    r"\ge": lambda end: [("[", end, _INFINITY, ")")],
    "=": lambda end: [("[", end, end, "]")],
    r"\neq": lambda end: [("(", _MINUS_INFINITY, end, ")"), ("(", end, _INFINITY, ")")],
}
