r"""What an answer is made of."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.answer_parts import (
    MAX_ITEMS,
    column_rows,
    distinct,
    equation_sides,
    items,
    label,
    last_value,
    matrix_rows,
    renamed,
    tuple_entries,
    without_conditions,
    without_subscripts,
)


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("5", ["5"]),
        ("1, 2 and 3", ["1", "2", "3"]),
        ("1,2,3", ["1", "2", "3"]),
        ("x = 1 or x = 2", ["x = 1", "x = 2"]),
        (r"\{3, 2, 1\}", ["3", "2", "1"]),
        ("(1, 2), (3, 4)", ["(1, 2)", "(3, 4)"]),
        ("(1, 2)", ["(1, 2)"]),  # a tuple is one answer
        ("1,000, 2,000", ["1,000", "2,000"]),  # with space after the comma, the others are for thousands
        (r"\pm 3", ["+ 3", "- 3"]),
        (r"1 \pm \sqrt{2}", [r"1 + \sqrt{2}", r"1 - \sqrt{2}"]),
        ("(a, b) = (1, 2)", ["a = 1", "b = 2"]),
    ],
)
def test_items(text: str, members: list[str]) -> None:
    assert items(text) == members


def test_items_are_bounded() -> None:
    assert len(items(", ".join(map(str, range(5_000))))) == MAX_ITEMS + 1
    assert items(r"\pm 1" * 9) == [r"\pm 1" * 9]  # not 512


@pytest.mark.parametrize(
    ("text", "entries"),
    [("(1, 2)", ["1", "2"]), ("[0,1)", ["0", "1"]), ("(1)", None), ("1, 2", None), ("(1, 2), (3, 4)", None)],
)
def test_tuple_entries(text: str, entries: list[str] | None) -> None:
    assert tuple_entries(text) == entries


def test_matrix_rows() -> None:
    rows = [["1", "2"], ["3", "4"]]
    assert matrix_rows(r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}") == rows
    assert matrix_rows(r"(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array})") == rows
    assert matrix_rows("(1, 2)") is None
    assert column_rows("(1, 2)") == [["1"], ["2"]]
    assert column_rows("1") is None


@pytest.mark.parametrize(
    ("text", "name", "strict_name"),
    [
        ("x = 5", "x", "x"),
        ("x_1 = 5", "x_1", "x_1"),
        ("f(2) = 5", "f(2)", "f(2)"),
        (r"\text{Area} = 5", "area", "area"),
        ("Area: 5", "area", "area"),
        ("2 + 3 = 5", "2+3", "2+3"),
        ("a + b = 5", "a+b", None),
        ("2x = 5", None, None),
        ("5", None, None),
        (r"x \in [0, 1]", "x", "x"),
    ],
)
def test_label(text: str, name: str | None, strict_name: str | None) -> None:
    assert label(text) == name
    assert label(text, strict=True) == strict_name


def test_equations() -> None:
    assert equation_sides("x = y = 5") == ["x", "y", "5"]
    assert equation_sides(r"x \le 5") == [r"x \le 5"]
    assert last_value("x = y = 5") == "5"
    assert last_value("5") == "5"


def test_names() -> None:
    assert renamed("t + at + e^t", "t", "x") == "x + at + e^x"
    assert without_subscripts("x_1 + x_{12}") == "x + x"
    assert distinct(["1", "x + 1", "1", "x+1"]) == ["1", "x+1"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (r"n + 1 \text{ for all } n", "n + 1"),
        (r"2k, \text{ where } k \in \mathbb{Z}", "2k"),
        (r"f(x) = x \text{ for any real } x, f(x) = 0", "f(x) = x, f(x) = 0"),
        ("n + 1", "n + 1"),
        (r"\text{for all } n", r"\text{for all } n"),  # there is nothing else
    ],
)
def test_conditions_are_left_out(text: str, kept: str) -> None:
    assert without_conditions(text) == kept
