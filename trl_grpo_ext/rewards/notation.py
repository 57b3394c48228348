r"""One notation for the many ways to write an answer: what only dresses it is dropped, synonyms become one.

Text in, text out; nothing is parsed or evaluated here. All of it is linear in the length of the text.
"""

from __future__ import annotations

import re
from functools import lru_cache

_TEXT_NAMES = r"text|textbf|textit|textrm|textnormal|textsf|mbox|hbox|mathrm|operatorname\*?"
TEXT_COMMAND = re.compile(rf"\\(?:{_TEXT_NAMES})\s*\{{[^{{}}]*\}}")

_FULL_WIDTH = {0xFF01 + i: chr(0x21 + i) for i in range(94)}
_SYMBOLS = {
    "−‒–﹣": "-", "\u00a0\u2009\u202f\u2007\u3000": " ", "，、": ",", "。": ".", "×": r"\times ", "·⋅": r"\cdot ",
    "÷": r"\div ", "≤⩽": r"\le ", "≥⩾": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "±": r"\pm ", "∞": r"\infty ",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "°": r"^\circ ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "∅": r"\emptyset ",
    "∀": r"\forall ", "∃": r"\exists ",
}  # fmt: skip
_TRANSLATION = str.maketrans({ord(c): to for group, to in _SYMBOLS.items() for c in group} | _FULL_WIDTH)

# `\frac`, `\text`, `\boxed`, `\right` in a string whose backslashes were once read as escapes: form feed + "rac", ...
_DAMAGE = (
    (re.compile("\x0c(?=rac|box)"), r"\\f"),
    (re.compile("\t(?=ext|imes|an[^a-z]|heta|frac|riangle)"), r"\\t"),
    (re.compile("\x08(?=oxed|eta|egin|inom)"), r"\\b"),
    (re.compile("\r(?=ight|ho[^a-z])"), r"\\r"),
)
_NOT_A_LETTER = r"(?![A-Za-z])"
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[()\[\]]|\$\$", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it)" + _NOT_A_LETTER, " "),
        (r"<sup>([^<>]*)</sup>", r"^{\1}"),
        (r"<sub>([^<>]*)</sub>", r"_{\1}"),
        (r"\\!\s*", ""),  # negative thin space: `32,\! 349` is how MATH writes 32,349
        (r"\{\s*,\s*\}", ","),
        (r"(?<!\\)\\(?:[,;:> ]|quad\b|qquad\b|hspace\{[^{}]*\}|phantom\{[^{}]*\})|~", " "),
        (r"\\[dtc]frac" + _NOT_A_LETTER, r"\\frac"),
        (r"\\frac\s+(?=\{)", r"\\frac"),
        (r"\\frac\s*(\\pi|\d|(?<=\s)[A-Za-z])\s*(\\pi|\d|[A-Za-z])", r"\\frac{\1}{\2}"),
        (r"(\\frac\{[^{}]*\})\s*([A-Za-z\d])", r"\1{\2}"),
        (rf"\\(?:{_TEXT_NAMES})\s*\{{", r"\\text{"),
        (r"\\(?:mathbf|boldsymbol|bm|mathit|vec|overrightarrow)\s*\{([^{}]*)\}", r"\1"),
        (r"\\text\{\s*,?\s*(and|or)\s*,?\s*\}", r" \1 "),
        (r"\\(?:leqslant|leq|le)" + _NOT_A_LETTER + r"|<=", r"\\le "),
        (r"\\(?:geqslant|geq|ge)" + _NOT_A_LETTER + r"|>=", r"\\ge "),
        (r"\\lt" + _NOT_A_LETTER, "<"),
        (r"\\gt" + _NOT_A_LETTER, ">"),
        (r"\\(?:neq|ne)" + _NOT_A_LETTER + r"|\s!=\s", r"\\neq "),
        (r"\\mid" + _NOT_A_LETTER, "|"),
        (r"\\%", "%"),
        (r"\\varnothing" + _NOT_A_LETTER, r"\\emptyset "),
        (r"\^\s*\{?\s*\\(?:circ|textcirc|degree)" + _NOT_A_LETTER + r"\s*\}?|\\degree" + _NOT_A_LETTER, r"^\\circ "),
        (r"(?<=\d)\s*\^\s*\{\s*(?:\\text\{\s*)?(?:st|nd|rd|th)\s*\}?\s*\}", " "),  # 12^{\text{th}}
        (r"(?<=\d)\s*\\text\{\s*(?:st|nd|rd|th)\s*\}|(?<=\d)(?:st|nd|rd|th)(?![A-Za-z])", " "),
        (r"(?<![A-Za-z\\])pi" + _NOT_A_LETTER, r"\\pi "),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?:√|(?<![A-Za-z\\])sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\^\s*(-\d+|\d{2,})", r"^{\1}"),  # a plain 2^10 means 2^{10}
        (r"([(\[,]\s*)\+(?=\s*\\infty)", r"\1"),
    )
)
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}])")
_HAS_ROWS = re.compile(r"matrix|array|cases|aligned")
_END = re.compile(r"(?<![\\.,;:^\s])[.,;:^\s]+$")  # of `\,` the backslash would be left
_WRAPPERS = (("**", "**"), ("`", "`"), ('"', '"'), ("“", "”"))
_ONE_TOKEN_GROUP = re.compile(r"(?<![\\A-Za-z])\{(\w|\\[A-Za-z]+)\}|(?<=[A-Za-z])\{(\w|\\[A-Za-z]+)\}")
_IDLE_SPACE = re.compile(r"(?<=[A-Za-z])\s+(?![A-Za-z])|(?<=\d)\s+(?!\d)|(?<![A-Za-z\d])\s+")
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ -][^\W\d_]+)*")


def normalise(text: str) -> str:
    r"""The answer without what only dresses it: math delimiters, bold, spacing, `\left`, a final full stop.

    `\text{..}` stays, under that one name: words and symbols are told apart by it.
    """
    text = text.translate(_TRANSLATION)
    for pattern, replacement in _DAMAGE:
        text = pattern.sub(replacement, text)
    if not _HAS_ROWS.search(text):
        text = _DOUBLED.sub(r"\\", text)
    text = _without_dollars(_unwrapped(_END.sub("", text).strip()))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _END.sub("", " ".join(text.split()).removeprefix("= "))
    whole = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return whole[1].strip() if whole else text


@lru_cache(maxsize=4096)
def squeezed(text: str) -> str:
    r"""A normalised text in the form in which equal ones are equal strings.

    Without the wrapping of `\text{}`, without spaces that separate neither two words nor two numbers, without the
    braces around a single token (`x^{2}`, `\frac{1}{2}`), and without case where there are only words.
    """
    text = _IDLE_SPACE.sub("", words_kept(text).replace(r"\$", "$"))
    text = _ONE_TOKEN_GROUP.sub(lambda match: match[1] or match[2], text)
    return text.casefold() if _WORDS.fullmatch(text) else text


def words_kept(text: str) -> str:
    r"""The insides of `\text{}` as words among the rest."""
    return " ".join(TEXT_COMMAND.sub(lambda match: f" {match[0].partition('{')[2][:-1]} ", text).split())


def words_dropped(text: str) -> str:
    r"""The formula without its `\text{}`, or, where nothing but words is left over, with them."""
    formula = _END.sub("", " ".join(TEXT_COMMAND.sub(" ", text).split()))
    return formula if re.search(r"[A-Za-z\d]", formula) else words_kept(text)


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand outside all brackets, stripped, without empty ones."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"(?P<open>[(\[{{])|(?P<close>[)\]}}])|(?P<separator>{separator.pattern})", text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(depth - 1, 0)
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def enclosed(text: str) -> str | None:
    """What stands inside the brackets that begin and end the text, whatever their kinds; None if no such pair does."""
    if text[:1] not in _OPEN or text[-1:] not in _CLOSE:
        return None
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and position < len(text) - 1:
            return None
    return text[1:-1].strip() if depth == 0 else None


def nesting(text: str) -> int:
    """How deep the brackets of a text nest; what is never closed counts too."""
    depth = deepest = 0
    for character in text:
        if character in _OPEN:
            depth += 1
            deepest = max(deepest, depth)
        elif character in _CLOSE:
            depth = max(depth - 1, 0)
    return deepest


def _unwrapped(text: str) -> str:
    for opening, closing in _WRAPPERS:
        inside = text[len(opening) : -len(closing)]
        if inside and text.startswith(opening) and text.endswith(closing) and opening not in inside:
            text = inside.strip()
    return text


def _without_dollars(text: str) -> str:
    """Dollars in pairs delimit formulas; a single one before or after a number is money."""
    dollars = [match.start() for match in re.finditer(r"(?<!\\)\$", text)]
    if len(dollars) % 2 == 0:
        return re.sub(r"(?<!\\)\$", " ", text)
    return text
