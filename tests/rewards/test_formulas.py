r"""Formulas in running text, and what tells them from prose."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.formulas import formulas, is_prose, without_formulas


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("those congruent to 2", True),
        ("因此共有三只 3", True),
        ("it is 3", True),
        ("Paris", True),
        (r"\sin x + \text{some words} or 3 ab", False),
        ("Minimum = 3", False),  # a name
        ("ab(ax - ay)", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", False),
        ("", False),
    ],
)
def test_prose_is_told_from_formulas(text: str, prose: bool) -> None:
    assert is_prose(text) is prose


@pytest.mark.parametrize(
    ("text", "insides"),
    [
        (r"As $x = 1$ and \(y = 2\), \[z = 3\] follows.", ["x = 1", "y = 2", "z = 3"]),
        ("$$a + b$$ and $c$", ["a + b", "c"]),
        ("It costs $18 and brings $20 a day.", []),  # money
        (r"It costs \$18, so $x = 18$.", ["x = 18"]),
        ("$18 - 2 = 16$", ["18 - 2 = 16"]),
        ("\\begin{align*} x &= 1 + 2 \\\\ &= 3 \\end{align*}", ["= 3"]),  # the last row
        ("$x = 1", []),
        ("", []),
    ],
)
def test_formulas(text: str, insides: list[str]) -> None:
    assert [inside for _, _, inside in formulas(text)] == insides


def test_positions_include_the_delimiters() -> None:
    text = r"As $x = 1$ and \(y\) hold"
    assert [text[start:end] for start, end, _ in formulas(text)] == ["$x = 1$", r"\(y\)"]
    assert without_formulas(text).split() == ["As", "and", "hold"]
