"""Where reasoning steps are: splitters, and that no text makes them slow."""

from __future__ import annotations

import pickle

import pytest

from trl_grpo_ext.rewards.steps import (
    SPLITTERS,
    SplitAt,
    find_splitter,
    split_blank_lines,
    split_lines,
    split_sentences,
    split_step_headings,
)


def pieces(splitter, text):
    return [text[start:end] for start, end in splitter(text)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one\n\ntwo", ["one", "two"]),
        ("  one \n \t\r\n\n\n two\nstill two \n\n", ["one", "two\nstill two"]),  # white space is of no step
        ("one", ["one"]),
        ("one\ntwo", ["one\ntwo"]),
        ("one\r\n\r\ntwo", ["one", "two"]),
        ("\n\n\n", []),
        ("", []),
    ],
)
def test_blank_lines(text, steps):
    assert pieces(split_blank_lines, text) == steps


def test_spans_are_positions_in_the_text():
    #       0123456789
    text = " ab\n\n c d "
    assert split_blank_lines(text) == [(1, 3), (6, 9)]
    assert split_lines(text) == [(1, 3), (6, 9)]
    assert split_sentences(text) == [(1, 3), (6, 9)]
    assert split_step_headings(text) == [(1, 9)]


def test_lines():
    assert pieces(split_lines, "48/2 = 24\n  48+24 = 72\n\n#### 72") == ["48/2 = 24", "48+24 = 72", "#### 72"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Step 1: add\nStep 2: take", ["Step 1: add", "Step 2: take"]),
        ("Well.\n\nStep 1: add\n\nto it\nstep 12 - take", ["Well.", "Step 1: add\n\nto it", "step 12 - take"]),
        ("**Step 1:** a\n### Step 2. b\n> Step 3) c\n__Step 4__\nd", None),
        ("Step 1\r\na\r\nStep 2\r\nb", ["Step 1\r\na", "Step 2\r\nb"]),
        # No headings: in the middle of a line, in a sentence, without a number, a decimal
        ("So Step 1: add", ["So Step 1: add"]),
        ("Step 1 is easy\nStep: two\nStep 1.5 x", ["Step 1 is easy\nStep: two\nStep 1.5 x"]),
        ("", []),
    ],
)
def test_step_headings(text, steps):
    expected = text.split("\n") if steps is None else steps
    if steps is None:
        expected = [*expected[:3], "\n".join(expected[3:])]
    assert pieces(split_step_headings, text) == expected


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Add 2. Then take 3! Is it 5? Yes", ["Add 2.", "Then take 3!", "Is it 5?", "Yes"]),
        ("It is 3.5 cm. So x.y = 2.", ["It is 3.5 cm.", "So x.y = 2."]),
        ("Use, e.g. 4, i.e. Mr. Fox vs. Dr. No. Done.", ["Use, e.g. 4, i.e. Mr. Fox vs. Dr. No.", "Done."]),
        ("Say approx. five. See (cf. Fig. 3). End", ["Say approx. five.", "See (cf. Fig. 3).", "End"]),
        ("1. First this.\n2. Then that.", ["1. First this.", "2. Then that."]),
        ('Wait... what?! He said "no." So (yes.) End $x.$ Z', None),
        ("先算三。再算四！“好。”完", ["先算三。", "再算四！", "“好。”", "完"]),
        ("no stop\n\nnext", ["no stop", "next"]),
    ],
)
def test_sentences(text, steps):
    assert pieces(split_sentences, text) == (
        ["Wait...", "what?!", 'He said "no."', "So (yes.)", "End $x.$", "Z"] if steps is None else steps
    )


def test_a_separator_of_ones_own():
    assert pieces(SplitAt("<step>"), "a <step>b\n\nc<step><step> d<step>") == ["a", "b\n\nc", "d"]
    assert pieces(SplitAt(".*"), "a.*b") == ["a", "b"]  # not a pattern
    with pytest.raises(ValueError, match="separator=''"):
        SplitAt("")


def test_find_splitter():
    assert find_splitter("lines") is split_lines
    own = SplitAt("|")
    assert find_splitter(own) is own
    with pytest.raises(
        ValueError, match=r"splitter='paragraphs'.*'blank_lines', 'lines', 'step_headings', 'sentences'"
    ):
        find_splitter("paragraphs")


@pytest.mark.parametrize("splitter", [*SPLITTERS.values(), SplitAt("<step>")], ids=[*SPLITTERS, "split_at"])
def test_any_text_gives_ordered_spans_in_time(splitter):
    # Quadratic matching would take hours on these, not a second.
    n = 300_000
    units = [
        "\n",
        " ",
        "\n \n",
        ".",
        ". ",
        "1. ",
        "a. ",
        "!",
        "。",
        "step ",
        "Step 1",
        "Step 1:\n",
        "*",
        "#",
        "\r",
        "<",
    ]
    units += ["<step>", "e.g. ", "\x00", "\ud800", ".)", "\u2028", "x"]
    for unit in units:
        text = unit * (n // len(unit)) + "x"
        end = 0
        for start, stop in splitter(text):
            assert end <= start < stop <= len(text)
            assert text[start:stop] == text[start:stop].strip()
            end = stop


@pytest.mark.parametrize("splitter", [*SPLITTERS.values(), SplitAt("<step>")], ids=[*SPLITTERS, "split_at"])
def test_splitters_can_be_sent_to_a_worker(splitter):
    text = "Step 1: a. B\n\nStep 2: c<step>d"
    assert pickle.loads(pickle.dumps(splitter))(text) == splitter(text)
