r"""Formulas in running text, and what tells them from prose."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trl_grpo_ext.rewards.notation import TEXT_COMMAND

MAX_ANSWER_CHARS = 512  # a final answer is short; whatever is longer is prose and is not compared as one answer

_DELIMITER = re.compile(
    r"(?P<skip>\\\$|\\\\)|(?P<dollar>\$\$?)|(?P<open>\\[(\[]|\\begin\{(?:align|equation|gather)\*?\})"
    r"|(?P<close>\\[)\]]|\\end\{(?:align|equation|gather)\*?\})"
)
_UNFINISHED = re.compile(r"[-+*/=<>]\s*$|^\s*[*/=]")
# Long words, and short ones that stand by themselves: `ab(ax - ay)` is a product.
_WORD = re.compile(r"(?<![^\W\d_])(?<!\\)[^\W\d_]{4,}|(?<!\S)[^\W\d_]{2,3}(?=[\s,.;:!?]|$)")
_NAME = re.compile(r"(?<![^\W\d_])(?<!\\)[A-Za-z]+(?: \d{1,2})?\s*(?:=|:(?=\s*[-\d(\\]))(?![^,;]*[A-Za-z]{4})")
_FORMULA_WORDS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln exp lg max min gcd lcm mod sqrt pi "
    "and or matrix pmatrix bmatrix vmatrix array cases begin end frac infty".split()
)


def is_prose(text: str) -> bool:
    r"""Whether a text holds words, outside of `\text{}` and beyond what a formula has (`sin`, `or`, `Minimum = 3`)."""
    text = _NAME.sub(" ", TEXT_COMMAND.sub(" ", text))
    words = [word for word in _WORD.findall(text) if word.lower() not in _FORMULA_WORDS]
    return any(len(word) > 3 for word in words) or len(words) > 1


def formulas(text: str) -> Iterator[tuple[int, int, str]]:
    """Where formulas start and end, delimiters included, and their insides, stripped. Dollars may also be money."""
    opened: re.Match[str] | None = None
    for token in _DELIMITER.finditer(text):
        if token["skip"]:
            continue
        if token["open"] or opened is None or (token["dollar"] and opened["dollar"] not in (None, token["dollar"])):
            opened = None if token["close"] else token
        elif token["close"] and opened["open"]:
            inside = text[opened.end() : token.start()].strip()
            yield opened.start(), token.end(), _last_row(inside) if opened["open"].startswith(r"\begin") else inside
            opened = None
        elif token["dollar"] and opened["dollar"]:
            inside = text[opened.end() : token.start()]
            if _is_formula(inside, is_display=token["dollar"] == "$$"):
                yield opened.start(), token.end(), inside.strip()
                opened = None
            else:
                opened = token


def _last_row(rows: str) -> str:
    return rows.strip().removesuffix(r"\\").rpartition(r"\\")[2].replace("&", " ").strip()


def _is_formula(inside: str, is_display: bool) -> bool:
    if not inside.strip() or len(inside) > 4 * MAX_ANSWER_CHARS or ("\n" in inside and not is_display):
        return False
    return not _UNFINISHED.search(inside) and not is_prose(inside)


def without_formulas(text: str) -> str:
    """What stands between the formulas."""
    parts, position = [], 0
    for start, end, _ in formulas(text):
        parts.append(text[position:start])
        position = end
    return " ".join([*parts, text[position:]])
