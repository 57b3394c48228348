r"""Sets of real numbers as answers state them."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.notation import normalise
from trl_grpo_ext.rewards.regions import Piece, Region, parse_region

LOW, HIGH = r"-\infty", r"\infty"


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("(2, 5]", Region((Piece("(", "2", "5", "]"),))),
        (r"(2, 5) \cup [7, \infty)", Region((Piece("(", "2", "5", ")"), Piece("[", "7", HIGH, ")")))),
        (r"(2, 5) \cup \{7\}", Region((Piece("(", "2", "5", ")"), Piece("[", "7", "7", "]")))),
        (r"2 < x \le 5", Region((Piece("(", "2", "5", "]"),), "x", True)),
        (r"5 \ge x > 2", Region((Piece("(", "2", "5", "]"),), "x", True)),
        ("x < 3", Region((Piece("(", LOW, "3", ")"),), "x", True)),
        ("3 > x", Region((Piece("(", LOW, "3", ")"),), "x", True)),
        (r"x \geq 3", Region((Piece("[", "3", HIGH, ")"),), "x", True)),
        (r"x \neq 3", Region((Piece("(", LOW, "3", ")"), Piece("(", "3", HIGH, ")")), "x", True)),
        ("x < 1 or x = 3", Region((Piece("(", LOW, "1", ")"), Piece("[", "3", "3", "]")), "x", True)),
        (r"\{x | x > 0\}", Region((Piece("(", "0", HIGH, ")"),), "x", True)),
        (r"\{ x \in \mathbb{R} : 0 < x < 1 \}", Region((Piece("(", "0", "1", ")"),), "x", True)),
        (r"x \in [0, 1)", Region((Piece("[", "0", "1", ")"),), "x")),
        # Not of these forms
        ("5", None),
        ("(1, 2, 3)", None),
        ("x < 1 or y > 3", None),  # two variables
        (r"\{y | x > 0\}", None),
        ("2 < x > 1", None),
        ("x < y", None),
        ("x + 1 < 3", None),  # not solved
        ("", None),
    ],
)
def test_parse_region(text: str, region: Region | None) -> None:
    assert parse_region(normalise(text)) == region
