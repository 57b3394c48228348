r"""Gold answers: how each data set writes them, and what they are.

A parser turns the value of a row into the gold answer as text, or raises `ValueError` saying what it should have been.
Nothing is guessed: a value that is not in the declared form is an error, not a row left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
MAX_DIGITS = 1000
MAX_TEXT_CHARS = 1000  # of an answer as text: longer is a worked solution, which has a form of its own


def after_hashes(value: Any) -> str:
    """What follows the last `####` of a worked solution (GSM8K, arXiv:2110.14168)."""
    _, marker, gold = _text(value).rpartition("####")
    if not marker or not gold.strip():
        raise ValueError("must end in '#### <gold answer>'")
    return gold.strip()


def last_boxed(value: Any) -> str:
    r"""The inside of the last `\boxed{...}` of a worked solution (MATH, arXiv:2103.03874); `\boxed 5` is 5."""
    text = _text(value)
    boxes = list(_BOX.finditer(text))
    inside = _inside(text, boxes[-1].end()) if boxes else ""
    if not inside.strip():
        raise ValueError(r"must hold its answer in \boxed{...}")
    return inside.strip()


def number(value: Any) -> str:
    """A number, plainly written: `1,234` is 1234, `51.0` is 51, `025` is 25."""
    text = _text(value).strip()
    if not any(c.isdigit() for c in text) or _NUMBER.fullmatch(text) is None:
        raise ValueError("must be a number")
    plain = Decimal(text.replace(",", ""))  # exact, of any length
    if abs(plain.adjusted()) > MAX_DIGITS:
        raise ValueError(f"must be a number of at most {MAX_DIGITS} digits")
    if not plain:
        return "0"
    written = format(plain, "f")
    return written.rstrip("0").rstrip(".") if "." in written else written


def text(value: Any) -> str:
    """The answer as it is."""
    gold = _text(value).strip()
    if not gold:
        raise ValueError("must not be blank")
    if len(gold) > MAX_TEXT_CHARS:
        raise ValueError(
            f"must be the answer alone, at most {MAX_TEXT_CHARS} characters (it has {len(gold)}); of worked solutions "
            "say how they state it: answer='gsm8k' or 'boxed'"
        )
    return gold


def raw(value: Any) -> str:
    """Whatever it is, of any length, for sources whose scorer does not go by it."""
    return "" if value is None else str(value)


PARSERS: dict[str, Callable[[Any], str]] = {
    "gsm8k": after_hashes,
    "boxed": last_boxed,
    "number": number,
    "text": text,
    "raw": raw,
}


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)) or value != value:
        raise ValueError("must be text or a number")
    if isinstance(value, float) and 2**53 <= abs(value) < float("inf"):  # digits may be lost already
        raise ValueError("is a number that was read as a float and may have lost digits: it must be written as text")
    return repr(value) if isinstance(value, float) else str(value)


def _inside(text: str, start: int) -> str:
    """What a box holds whose command ends at `start`: its braces, or the one token after it."""
    if text[start : start + 1] != "{":
        token = re.match(r"[^\s$}]+", text[start:])
        return token.group() if token else ""
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":  # a brace that is written, or a line break before a brace that is not
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
        position += 1
    return ""
