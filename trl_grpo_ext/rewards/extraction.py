r"""Where the answer stands in a text: in a model's completion, and in a dataset's gold column.

Everything here is linear in the length of the text, however hostile: a completion may be megabytes of open braces.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

MAX_ANSWER_CHARS = 512  # a final answer is short; whatever is longer is prose and is not compared as one answer

_BOX_TOKEN = re.compile(
    # \\+: some datasets escape the backslash twice
    r"(?P<box>\\+(?:boxed|fbox)\s*\{)|\\+(?:boxed|fbox)\s+(?P<bare>[^\s{}$\\]+)|\\.|[{}]",
    re.DOTALL,
)
_ANSWER_IS = re.compile(r"\banswer\b[\s*_]*(?:is|are|[:=])[\s*_:]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\*\*|\n")
_FORMULA_ENDS = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d])(?<!\d[.,])"  # not the tail of a name (x2) or of another number
    r"(?:(?<![\w)\]}])[-+\u2212])?(?:\\?[$€£])?[-\u2212]?"
    r"(?:\\[dt]?frac\{-?\d+\}\{-?\d+\}|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)(?:\\?%)?"
)
_WORD = re.compile(r"(?<![^\W\d_])(?<!\\)[^\W\d_]{2,}")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname)\{[^{}]*\}")


def extract_gold(text: str) -> str | None:
    r"""The gold answer in a dataset's own form, or None where there is none to be read.

    The inside of the last `<answer>..</answer>` if there is one; in it, what follows the last `####` on its line
    (GSM8K), or else the last `\boxed{...}` (MATH), or else the text itself. None for a blank result, for a `\boxed`
    that never closes and for a plain text longer than `MAX_ANSWER_CHARS`.
    """
    text = last_answer_block(text) or text
    if "####" in text:
        answer = after_hashes(text)
    elif re.search(r"\\boxed|\\fbox", text):
        answer = last_boxed(text)
    else:
        answer = text.strip()
    return answer if answer and len(answer) <= MAX_ANSWER_CHARS else None


def extract_prediction(text: str) -> str | None:
    r"""The final answer of a completion, or None if it states none.

    Looked for in what follows the thinking (after the last `</think>`; a `<think>` that never closes has nothing
    after it), in this order:

    1. the last `<answer>..</answer>`, narrowed by rules 2 to 4 to the answer it holds;
    2. the last `\boxed{...}`;
    3. what follows the last `####` on its line;
    4. what follows the last "the answer is" or "answer:";
    5. a text that is nothing but one formula, or the formula that the text ends in (`$..$`, `\(..\)`, `\[..\]`);
    6. the last number.

    Where that finds nothing, an `<answer>` block inside the thinking counts: it is marked as final, unlike any other
    number a model writes on its way.
    """
    final = _after_thinking(text)
    for part in (last_answer_block(final), final, last_answer_block(text)):
        answer = _stated_answer(part, is_block=part is not final) if part else None
        if answer:
            return answer
    return None


def last_answer_block(text: str) -> str | None:
    """The inside of the last `<answer>..</answer>` that is not blank, stripped."""
    end = text.rfind("</answer>")
    while end != -1:
        start = text.rfind("<answer>", 0, end)
        if start == -1:
            return None
        inside = text[start + len("<answer>") : end].strip()
        if inside:
            return inside
        end = text.rfind("</answer>", 0, start)
    return None


def last_boxed(text: str) -> str | None:
    r"""The inside of the last `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`) whose braces balance, stripped."""
    opened: list[int | None] = []  # one entry per open brace: where a box's inside starts, None for any other brace
    best: tuple[int, str] | None = None
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["bare"]:
            best = max(best or (-1, ""), (token.start("bare"), token["bare"].rstrip(".,;")))
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, text[start : token.start()])
    return best[1].strip() or None if best else None


def after_hashes(text: str) -> str | None:
    """What follows the last `####` on its line, stripped; None without one."""
    _, hashes, rest = text.rpartition("####")
    return rest.strip().split("\n", 1)[0].strip() or None if hashes else None


def after_answer_is(text: str) -> str | None:
    """What follows the last "the answer is" or "answer:", up to the end of its formula or sentence."""
    match = _last_match(_ANSWER_IS, text)
    if match is None:
        return None
    rest = text[match.end() :].lstrip()
    formula = _leading_formula(rest)
    if formula is not None:
        return formula
    end = _SENTENCE_END.search(rest)
    return rest[: end.start() if end else None].strip() or None


def last_number(text: str) -> str | None:
    r"""The last number as it is written: sign, currency, thousands separators, a/b, \frac{a}{b}, percent sign."""
    match = _last_match(_NUMBER, text)
    return match[0] if match else None


def is_prose(text: str) -> bool:
    r"""Whether a text holds words, outside of `\text{}` and beyond what a formula has (`sin`, `or`, `mod`)."""
    words = [word for word in _WORD.findall(_TEXT_COMMAND.sub(" ", text)) if word.lower() not in _FORMULA_WORDS]
    return any(len(word) > 3 for word in words) or len(words) > 1


_FORMULA_WORDS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln exp lg max min gcd lcm mod sqrt pi "
    "and or matrix pmatrix bmatrix vmatrix array cases begin end frac infty".split()
)


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0] if last else None


def _after_thinking(text: str) -> str:
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]


def _stated_answer(text: str, is_block: bool) -> str | None:
    finders: tuple[Callable[[str], str | None], ...] = (last_boxed, after_hashes, after_answer_is)
    for find in finders:
        answer = find(text)
        if answer:
            return answer if len(answer) <= MAX_ANSWER_CHARS else last_number(answer)
    text = text.strip()
    fits = 0 < len(text) <= MAX_ANSWER_CHARS
    if fits and (is_block or ("\n" not in text and not is_prose(text))):
        return text
    return _closing_formula(text[-MAX_ANSWER_CHARS:]) or last_number(text)


def _leading_formula(text: str) -> str | None:
    for start, end in _FORMULA_ENDS.items():
        if text.startswith(start):
            close = text.find(end, len(start))
            return text[len(start) : close].strip() or None if close != -1 else None
    return None


def _closing_formula(text: str) -> str | None:
    text = text.rstrip(" \n\t.,;*")
    for start, end in _FORMULA_ENDS.items():
        if text.endswith(end) and not text.endswith("\\" + end):
            inside = text[: -len(end)]
            opening = inside.rfind(start)
            if opening != -1:
                return inside[opening + len(start) :].strip() or None
    return None
