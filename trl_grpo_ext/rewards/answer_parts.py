r"""What an answer is made of, where its form is plain: items, entries, rows, the name and the value of an equation.

Text in, text out: nothing here says what is equal. All texts are normalised (`notation.normalise`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from trl_grpo_ext.rewards.formulas import is_prose
from trl_grpo_ext.rewards.notation import TEXT_COMMAND, enclosed, split_top, squeezed

MAX_ITEMS = 64  # a list with more is compared as text only
_MAX_SIGNS = 3  # `\pm` in one item

_SEPARATOR = re.compile(r",?\s*(?<![A-Za-z\\])(?:and|or)(?![a-z])|[;,&]")
_WIDE_SEPARATOR = re.compile(r",?\s*(?<![A-Za-z\\])(?:and|or)(?![a-z])|;|,(?!\d{3}(?!\d))|,(?=\s)")
_EQUALS = re.compile(r"(?<![<>!:])=|\\in(?![A-Za-z])|(?<=[A-Za-z]):\s|(?<=[A-Za-z] \d):\s")
_CONDITION = re.compile(
    r"(?<=[^\s{])\s*,?\s*(?:"
    r"(?:\\text\{\s*,?\s*)?(?:(?<![A-Za-z\\])for (?:all|any|every|each|some|integers?)(?![A-Za-z])|\\forall)"
    r"(?:(?!,|;|(?<![A-Za-z])(?:and|or)(?![A-Za-z])).)*"
    r"|(?:\\text\{\s*,?\s*)?(?<![A-Za-z\\])where(?![A-Za-z]).*|\\text\{\s*(?!(?:or|and|but|maybe|perhaps|possibly)\b)(?:[^{}\s]+\s+){4}[^{}]*\}.*)"
)
_MATRIX = re.compile(
    r"\(?\s*\\begin\{(?P<name>[pbB]?matrix)\}(?P<rows>.*)\\end\{(?P=name)\}\s*\)?"
    r"|[(\[]\s*\\begin\{array\}\s*(?:\{[^{}]*\})?(?P<array>.*)\\end\{array\}\s*[)\]]"
)
_COMMA, _SPACED_COMMA = re.compile(r"[,;]"), re.compile(r",(?=\s)|;")
_SUBSCRIPT, _SUPERSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)"), re.compile(r"\^(?:\{[^{}]*\}|\w)")
_ARGUMENTS = re.compile(r"\([^()]*\)")


def items(text: str) -> list[str]:
    r"""The members of a list or set, `\pm` written out; a single answer is a list of one."""
    inside = enclosed(text.removeprefix("\\").replace(r"\}", "}")) if text.startswith((r"\{", "{")) else None
    text = inside if inside is not None else text
    separator = _WIDE_SEPARATOR if re.search(r",\s", text) else _SEPARATOR
    members = [without_conditions(item) for item in split_top(text, separator)[: MAX_ITEMS + 1]]
    if len(members) == 1:
        members = _named_tuple(members[0]) or members
    return [signed for member in members for signed in _both_signs(member)]


def _named_tuple(text: str) -> list[str] | None:
    """`(a, b) = (1, 2)` as `a = 1` and `b = 2`."""
    sides = [tuple_entries(side) for side in split_top(text, re.compile("="))]
    if len(sides) != 2 or sides[0] is None or sides[1] is None or len(sides[0]) != len(sides[1]):
        return None
    return [f"{name} = {value}" for name, value in zip(*sides, strict=True)]


def _both_signs(item: str) -> list[str]:
    count = item.count(r"\pm")
    if not 0 < count <= _MAX_SIGNS:
        return [item]
    parts = item.split(r"\pm")
    return [
        parts[0] + "".join(sign + part for sign, part in zip(signs, parts[1:], strict=True))
        for signs in product("+-", repeat=count)
    ]


def tuple_entries(text: str) -> list[str] | None:
    """The entries of `(1, 2)` or `[0, 1)`, at least two; None for anything else."""
    inside = enclosed(text) if text[:1] in ("(", "[") else None
    if inside is None:
        return None
    entries = split_top(inside, _SPACED_COMMA if re.search(r",\s", inside) else _COMMA)
    return entries if len(entries) > 1 else None


def matrix_rows(text: str) -> list[list[str]] | None:
    """The entries of a matrix, row by row; None for anything else."""
    match = _MATRIX.fullmatch(text)
    if not match or match[0].count(r"\begin") > 1:
        return None
    rows = re.split(r"\\\\", match["rows"] or match["array"] or "")
    return [[cell.strip() for cell in row.split("&")] for row in rows if row.strip()]


def column_rows(text: str) -> list[list[str]] | None:
    """A tuple as the matrix of one column that it is; None for anything else."""
    entries = tuple_entries(text)
    return None if entries is None else [[entry] for entry in entries]


def equation_sides(text: str) -> list[str]:
    r"""What stands between the equality signs; `x \in` and `Area:` count as such. One element if it is no equation."""
    return split_top(text, _EQUALS)


def label(text: str, strict: bool = False) -> str | None:
    """What an equation says it is the value of: `x`, `f(2)`, `Area`, `2 + 3`; None if it says no such thing (`2x = 5`).

    Any expression of numbers alone will do. One with letters must be a name, if `strict`, or else an expression without
    numbers (`a + b = 5`), whose value a question may have asked for.
    """
    sides = equation_sides(text)
    if len(sides) < 2:
        return None
    name = sides[0]
    has_letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", TEXT_COMMAND.sub("", text)))
    if is_prose(name) or not has_letters:
        return squeezed(name)
    core = _ARGUMENTS.sub("", _SUBSCRIPT.sub("", TEXT_COMMAND.sub("", name)))
    core = core if strict else _SUPERSCRIPT.sub("", core)
    is_name = not re.search(r"\d|[+^]|-|\\(?:sin|cos|tan|log|ln)" if strict else r"\d", core)
    return squeezed(name) if is_name else None


def without_subscripts(name: str) -> str:
    """`x_1` as `x`."""
    return _SUBSCRIPT.sub("", name)


def last_value(text: str) -> str:
    """What stands after the last equality sign, or all of it without one."""
    sides = equation_sides(text)
    return sides[-1] if len(sides) > 1 else text


def renamed(text: str, old: str, new: str) -> str:
    """With another letter for the variable `old`."""
    return re.sub(rf"(?<![A-Za-z\\]){old}(?![A-Za-z])", new, text)


def distinct(members: Sequence[str]) -> list[str]:
    """Each member once, as a set has it, in order."""
    return list({squeezed(member): member for member in members}.values())


def without_conditions(text: str) -> str:
    r"""`n + 1 \text{ for all } n` without what follows the `n + 1`."""
    return _CONDITION.sub("", text).strip() or text
