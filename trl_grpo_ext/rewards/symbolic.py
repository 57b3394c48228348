r"""Symbolic comparison of two answers with math-verify, behind a guard against inputs that would never finish.

math-verify bounds its work with `signal.alarm`, which exists only in the main thread. Elsewhere (an async reward, a
thread pool) its time-outs must be off, so the guard is all there is; it therefore refuses cheaply, before parsing,
whatever sympy would evaluate into something huge. A refused answer can still be right by its text or as a number.
"""

from __future__ import annotations

import logging
import re
import threading

from math_verify import parse, verify

from trl_grpo_ext.rewards.extraction import MAX_ANSWER_CHARS

PARSE_SECONDS = 3
VERIFY_SECONDS = 3
# Limits found by trying: what passes them took 3 seconds at most on a busy core; all answers of MATH but one pass.
_MAX_NESTING = 10
_MAX_DIGIT_RUN = 64
_MAX_FUNCTIONS = 6
_MAX_NUMERIC_EXPONENT = 9_999  # of a number: 2^{2024} is a real answer
_MAX_EXPONENT = 100  # where there are variables: simplifying polynomials
_MAX_EXPANSION = 24  # sum of the n of all (..)^n, times the number of variables: sympy multiplies them out

# Any factorial but that of a plain number below 100 (`7!/16` is a real answer): not 99999999!, (..)!, 5!!, 50!^{999}.
_FACTORIAL = re.compile(r"(?<!\\)(?<!(?<!\d)\d)(?<!(?<!\d)\d\d)!(?!=)|!\s*(?:!|\^|\*\*)")
# Operators that sympy carries out term by term, and functions that grow like a factorial or a tower.
_UNBOUNDED = re.compile(
    r"\\(?:sum|prod|int|oint|iint|lim|Gamma|[dt]?binom|choose|zeta)(?![a-zA-Z])|\\(?:exp|sinh|cosh|tanh)\b.*\d{3}",
    re.DOTALL,
)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|sinh|cosh|tanh|log|ln|exp|lg)(?![a-zA-Z])")
_GREEK = re.compile(r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)(?![a-zA-Z])")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*(?P<exponent>\{|\(|[-+]?(?:\d+|[A-Za-z]|\\[A-Za-z]+))")
_OPEN, _CLOSE = "{([", "})]"


def symbolically_equal(gold: str, prediction: str) -> bool:
    """Whether math-verify finds the two answers mathematically equal; False for what it cannot parse or must not."""
    if is_hostile(gold) or is_hostile(prediction):
        return False
    # Checked at every call: the same function may serve the trainer's main thread and an async reward's.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread:
        # It warns that time-outs are off; that is meant.
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)
    parse_seconds, verify_seconds = (PARSE_SECONDS, VERIFY_SECONDS) if in_main_thread else (None, None)
    parsed_gold = parse(_as_math(gold), parsing_timeout=parse_seconds)
    if not parsed_gold:
        return False
    parsed_prediction = parse(_as_math(prediction), parsing_timeout=parse_seconds)
    return bool(parsed_prediction) and verify(parsed_gold, parsed_prediction, timeout_seconds=verify_seconds)


def is_hostile(text: str) -> bool:
    """Whether to evaluate this could take longer than any real answer deserves; decided without parsing it."""
    return (
        len(text) > MAX_ANSWER_CHARS
        or _nesting(text) > _MAX_NESTING
        or re.search(rf"\d{{{_MAX_DIGIT_RUN + 1}}}", text) is not None
        or _FACTORIAL.search(text) is not None
        or _UNBOUNDED.search(text) is not None
        or len(_FUNCTION.findall(text)) > _MAX_FUNCTIONS
        or _has_huge_power(text)
    )


def _as_math(text: str) -> str:
    """math-verify reads LaTeX only between delimiters."""
    has_delimiters = "$" in text or r"\(" in text or r"\[" in text
    return text if has_delimiters else f"${text}$"


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in _OPEN:
            depth += 1
            deepest = max(deepest, depth)
        elif character in _CLOSE:
            depth = max(depth - 1, 0)
    return deepest


def _has_huge_power(text: str) -> bool:
    r"""Towers (`9^{9^9}`, `2^x^y`), huge exponents, and powers of sums that would have to be multiplied out."""
    variables = _count_variables(text)
    group_exponents = 0
    for match in _EXPONENT.finditer(text):
        exponent, end = _exponent(text, match)
        if "^" in exponent or "**" in exponent or re.match(r"\s*(?:\^|\*\*)", text[end:]):
            return True
        # Digits are counted before they are read: int() of a long run is itself quadratic.
        runs = re.findall(r"\d+", exponent)
        if any(len(run) > 4 or int(run) > (_MAX_EXPONENT if variables else _MAX_NUMERIC_EXPONENT) for run in runs):
            return True
        if text[: match.start()].rstrip()[-1:] in tuple(_CLOSE):
            group_exponents += sum(int(run) for run in runs)
    return group_exponents * variables > _MAX_EXPANSION or group_exponents > _MAX_EXPONENT


def _count_variables(text: str) -> int:
    """How many different letters stand for something unknown; at worst too many: the guard is then stricter."""
    letters = set(re.findall(r"[A-Za-z]", _COMMAND.sub(" ", text))) - {"e", "i"}
    return len(letters) + len(set(_GREEK.findall(text)))


def _exponent(text: str, match: re.Match[str]) -> tuple[str, int]:
    """The exponent after a `^`, and where it ends: a bracketed group (to the end if it never closes) or one token."""
    start = match.start("exponent")
    if text[start] not in _OPEN:
        return match["exponent"], match.end()
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        if depth == 0:
            return text[start + 1 : position], position + 1
    return text[start + 1 :], len(text)


def warm_up() -> None:
    """Make sympy and the LaTeX parser load and build what they keep; called once, before reward workers are forked."""
    symbolically_equal(r"\frac{x+1}{2}", r"\frac{1}{2}(1+x)")
