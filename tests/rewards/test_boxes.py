r"""What stands in a box, and which boxes are one answer."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.boxes import has_box, last_boxed, unclosed_box


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces do not nest
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed 5.", "5"),
        (r"} \boxed{4} {", "4"),
        (r"\\boxed{840}", "840"),  # a backslash escaped twice, as some datasets have it
        (r"\boxed{3} \boxed{ }", "3"),
        ("boxed{4}", None),
        # Boxes that are one answer, and boxes that are not
        (r"$\boxed{2}$ and $\boxed{3}$", "2, 3"),
        (r"$x = \boxed{2}, y = \boxed{3}$", "2, 3"),
        (r"\boxed{1}, \boxed{2} or \boxed{3}", "1, 2, 3"),
        (r"\boxed{2} and \boxed{2}", "2"),
        (r"\boxed{2}. So \boxed{3}", "3"),
        (r"\boxed{2}, no: \boxed{3}", "3"),
        (r"\boxed{2}, but I made a mistake, \boxed{3}", "3"),
        (r"\boxed{2} and 5 more, hence \boxed{7}", "7"),
    ],
)
def test_last_boxed(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{42", "42"),
        (r"so \boxed{\frac{1}{2}$.", r"\frac{1}{2}"),  # nothing else is open
        (r"so \boxed{\frac{1}{2$.", None),
        ("so \\boxed{42\nand more", None),
        ("42", None),
    ],
)
def test_unclosed_box(text: str, inside: str | None) -> None:
    assert (unclosed_box(text) or None) == inside


def test_has_box() -> None:
    assert has_box(r"\boxed{") and has_box(r"\fbox 5")
    assert not has_box("boxed{4}")


def test_is_linear_in_backslashes() -> None:
    assert last_boxed("\\" * 2_000_000 + r"boxed{1}") == "1"  # quadratic code would need an hour
