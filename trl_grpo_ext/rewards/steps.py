r"""Where the reasoning steps of a completion are: text -> character spans.

A splitter is any function from a text to spans `(start, end)`: in order, not overlapping, none of them blank, without
the white space around a step. Those here take time linear in the text, whatever is in it. Which one fits depends on
how the policy was told (or is used) to write:

- `blank_lines`: paragraphs. The common form of worked solutions, and how ProcessBench cut its solutions into steps;
- `lines`: one step per line, as in GSM8K's solutions and Math-Shepherd's;
- `step_headings`: `Step 3: ...`, also `**Step 3**`, `### Step 3.`;
- `sentences`: for running text;
- `SplitAt("<step>")`: a separator that the policy was trained to write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
Splitter: TypeAlias = Callable[[str], list[Span]]

# No pattern below can start a long match at more than one place of a run of equal characters: that keeps them linear.
_LINE_BREAK = re.compile(r"\n")
_BLANK_LINES = re.compile(r"\n\s*\n")
_HEADING = re.compile(
    r"^[ \t>#*_]{0,16}step[ \t]{0,4}\d{1,6}(?!\d)(?=[ \t*_]{0,8}(?:[:)–—-]|\.(?!\d)|\r?$))",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(
    r"""(?<![.!?…])[.!?…]+["'”’)\]*_$]{0,4}(?=\s)  # 3.5 has no white space after its point
    |[。！？]+[”’」』）]{0,4}
    |\n\s*\n""",
    re.VERBOSE,
)
_ABBREVIATIONS = frozenset("e.g i.e cf vs mr mrs ms dr prof fig figs eq eqs approx resp".split())
_LONGEST_ABBREVIATION = 6
_LONGEST_NUMBERING = 12  # "\n 12" and the like


def split_blank_lines(text: str) -> list[Span]:
    """Paragraphs: what stands between lines that are empty or hold white space only."""
    return _between(text, (match.span() for match in _BLANK_LINES.finditer(text)))


def split_lines(text: str) -> list[Span]:
    """Lines that are not blank."""
    return _between(text, (match.span() for match in _LINE_BREAK.finditer(text)))


def split_step_headings(text: str) -> list[Span]:
    """From one `Step k` heading at the start of a line to the next; what stands before the first is a step of its own.

    Case does not matter, nor do the numbers' values. After the number there must be a colon, a full stop, a dash, a
    closing parenthesis or the line's end, behind Markdown's marks if any: "Step 2 is easy" is no heading.
    """
    return _between(text, ((match.start(), match.start()) for match in _HEADING.finditer(text)))


def split_sentences(text: str) -> list[Span]:
    """Sentences: up to `.`, `!`, `?` and white space, up to `。`, `！`, `？`, or up to a blank line.

    A full stop is no end in decimals, after common abbreviations, before a word in lower case, and in `1.` at the
    beginning of a sentence.
    """
    return _between(text, _sentence_cuts(text))


@dataclass(frozen=True, slots=True)
class SplitAt:
    """Split at every occurrence of a separator, which belongs to no step.

    Raises:
        ValueError: the separator is empty.
    """

    separator: str

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("separator='' must hold at least one character: it is what stands between two steps.")

    def __call__(self, text: str) -> list[Span]:
        """The steps of a text."""
        pattern = re.compile(re.escape(self.separator))
        return _between(text, (match.span() for match in pattern.finditer(text)))


SPLITTERS: dict[str, Splitter] = {
    "blank_lines": split_blank_lines,
    "lines": split_lines,
    "step_headings": split_step_headings,
    "sentences": split_sentences,
}


def find_splitter(splitter: str | Splitter) -> Splitter:
    """A splitter by its name in `SPLITTERS`, or the function itself.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(splitter, str):
        return splitter
    if splitter not in SPLITTERS:
        raise ValueError(
            f"splitter={splitter!r} is not known: it must be one of {', '.join(map(repr, SPLITTERS))}, or a function "
            "from a text to a list of (start, end). Pass one of these."
        )
    return SPLITTERS[splitter]


def _between(text: str, cuts: Iterable[Span]) -> list[Span]:
    """What is left of the text between the cuts, white space trimmed, blank pieces dropped."""
    spans = []
    start = 0
    for cut_start, cut_end in [*cuts, (len(text), len(text))]:
        piece = text[start:cut_start]
        stripped = piece.strip()
        if stripped:
            first = start + len(piece) - len(piece.lstrip())
            spans.append((first, first + len(stripped)))
        start = cut_end
    return spans


def _sentence_cuts(text: str) -> Iterable[Span]:
    start = 0  # of the sentence under way
    for match in _SENTENCE_END.finditer(text):
        if match.group() == "." and not _is_full_stop(text, start, match.start()):
            continue
        start = match.end()
        yield start, start


def _is_full_stop(text: str, sentence: int, dot: int) -> bool:
    """Whether the single dot at `dot`, with white space after it, ends the sentence that began at `sentence`."""
    following = text[dot + 1 : dot + 3].lstrip()  # white space and the next character, or not much to go by
    if following and following.islower():
        return False
    before = text[max(sentence, dot - _LONGEST_ABBREVIATION - 1) : dot].split()
    word = before[-1].lstrip("([{\"'").lower() if before else ""
    is_numbering = dot - sentence <= _LONGEST_NUMBERING and text[sentence:dot].strip(" \t\n\r*#>-").isdigit()
    return word not in _ABBREVIATIONS and not is_numbering
