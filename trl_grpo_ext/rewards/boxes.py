r"""Boxes: what stands in the last `\boxed{...}` of a text. Linear in its length, however many braces it opens."""

from __future__ import annotations

import re
from collections import deque

from trl_grpo_ext.rewards.formulas import MAX_ANSWER_CHARS

# Up to four backslashes: some datasets escape them twice. \x08: a \b that was read as an escape.
_COMMAND = r"(?:\\{1,4}b|\x08|\\{1,4}f)(?:oxed|box)"
_OPENED = re.compile(rf"{_COMMAND}\s*\{{")
_BOX_TOKEN = re.compile(
    rf"(?P<box>{_COMMAND}\s*\{{)|{_COMMAND}\s+(?P<bare>[^\s{{}}$\\]+)|\\.|[{{}}]",
    re.DOTALL,
)
_HAS_BOX = re.compile(r"\\boxed|\\fbox|\x08oxed")
_BLANK = re.compile(r"\s*")
_MAX_BOXES = 32  # in one answer
# Between boxes that form one answer, `\boxed{2} and \boxed{3}`: none of these words, no number, no end of a sentence.
_NEW_THOUGHT = frozenset(
    "but thus so hence therefore then not no wait actually rather because since if we get gives answer is".split()
)
_DRESS = re.compile(r"\\(?:text|quad|qquad|left|right|[()\[\],;: ])|[_^](?:\{\w*\}|\w)|[${}*]")


def has_box(text: str) -> bool:
    """Whether there is any, closed or not."""
    return _HAS_BOX.search(text) is not None


def last_boxed(text: str) -> str | None:
    r"""The inside of the last `\boxed{...}` (`\fbox{...}`, `\boxed 5`) that is not blank and whose braces balance.

    If only "and", "or" or a comma stands between it and the box before, the insides of both, and so on backwards,
    joined by commas.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    (outer, start, end), *others = sorted(boxes, key=lambda box: -box[1])
    answers = [text[start:end].strip().rstrip(".,;")]
    for previous_outer, previous_start, previous_end in others[:_MAX_BOXES]:
        if previous_end >= outer or not _are_joined(text[previous_end:outer]):
            break
        answer = text[previous_start:previous_end].strip()
        answers += [answer] if answer not in answers else []
        outer = previous_outer
    return ", ".join(reversed(answers))


def unclosed_box(text: str) -> str | None:
    """The rest of the line after the last box, if no other brace is left open in it: the text lost its end."""
    last = deque(_OPENED.finditer(text), maxlen=1)
    rest = text[last[0].end() :].strip() if last else ""
    braces = re.findall(r"(?<!\\)[{}]", rest[: MAX_ANSWER_CHARS + 1])
    return rest.rstrip("$. ") if "\n" not in rest and braces.count("{") == braces.count("}") else None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """For each box that closes and is not blank: where it starts, where its inside starts, and where that ends."""
    opened: list[tuple[int, int] | None] = []  # one entry per open brace: a box, or None for any other brace
    boxes = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            opened.append((token.start(), token.end()))
        elif token["bare"]:
            boxes.append((token.start(), token.start("bare"), token.end("bare")))
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            box = opened.pop()
            if box and not _BLANK.fullmatch(text, box[1], token.start()):
                boxes.append((*box, token.start()))
    return boxes


def _are_joined(between: str) -> bool:
    """Whether what stands between two boxes makes them one answer."""
    if len(between) > 70 or "\n\n" in between or re.search(r"[.!?](?:\s|\W*$)", between):
        return False
    between = _DRESS.sub(" ", between)
    words = set(re.findall(r"[a-z]+", between.lower()))
    if words & _NEW_THOUGHT or re.search(r"\d", between):
        return False
    return bool(words & {"and", "or"}) or "," in between or ";" in between or not re.search(r"[\w=]", between)
