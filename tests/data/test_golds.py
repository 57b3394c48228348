r"""Gold answers as data sets write them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from trl_grpo_ext.data.golds import PARSERS


@pytest.mark.parametrize(
    ("parser", "value", "gold"),
    [
        ("gsm8k", "3 #### no\n#### 1,234 ", "1,234"),
        ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"so \boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        ("boxed", r"is $\boxed 5$", "5"),
        ("boxed", r"\fbox{x}", "x"),
        ("number", "1,234,567", "1234567"),
        ("number", 51.0, "51"),
        ("number", 0.25, "0.25"),
        ("number", "025", "25"),
        ("number", "-3.50", "-3.5"),
        ("number", 7, "7"),
        ("number", Decimal("1.50"), "1.5"),  # Parquet's
        ("number", "-0.0", "0"),
        ("number", "1e3", "1000"),
        ("number", "1234567890123456789012345678901234", "1234567890123456789012345678901234"),  # not 28 digits of it
        ("number", "0.12345678901234567890123456789012345", "0.12345678901234567890123456789012345"),
        ("boxed", r"\boxed{1 \\} and", r"1 \\"),  # a line break, then the brace that ends the box
        ("text", "  x + 1 ", "x + 1"),
        ("raw", None, ""),
    ],
)
def test_parsed(parser: str, value: Any, gold: str) -> None:
    assert PARSERS[parser](value) == gold


@pytest.mark.parametrize(
    ("parser", "value", "message"),
    [
        ("gsm8k", "the answer is 5", "must end in '####"),
        ("gsm8k", "#### ", "must end in '####"),
        ("boxed", r"\boxed{cut off", r"must hold its answer in \\boxed"),
        ("boxed", "5", r"must hold its answer in \\boxed"),
        ("number", "five", "must be a number"),
        ("number", "1,23", "must be a number"),
        ("number", "", "must be a number"),
        ("number", "1e999999999", "must be a number of at most 1000 digits"),
        ("number", True, "must be text or a number"),
        ("text", " ", "must not be blank"),
        ("text", "x" * 1001, "must be the answer alone"),
        ("text", float("nan"), "must be text or a number"),
        ("text", ["5"], "must be text or a number"),
        ("text", 123456789012345678901234567890.0, "may have lost digits: it must be written as text"),
    ],
)
def test_refused(parser: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PARSERS[parser](value)
