r"""Whether two answers are the same, in every form there is a rule for; each right pair beside a wrong one."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.equivalence import COMPARISONS, answers_match, same_text


@pytest.mark.parametrize(
    ("gold", "prediction", "match"),
    [
        # As text
        ("Evelyn", r"\text{evelyn}", True),
        ("Evelyn", "Emily", False),
        (r"10!\text{ ways}", r"10! \text{ways}", True),  # although never evaluated
        ("1 1/2", "11/2", False),  # white space is not simply dropped
        ("", "", False),
        # Numbers
        ("1/2", "0.5", True),
        ("42", "42.000", True),
        ("42", "24", False),
        ("1000000", "1000001", False),
        (r"\frac{1}{3}", "0.333333333", True),
        ("70", "70,000", False),
        # Options
        ("(B)", "B", True),
        ("B", "B. Paris", True),
        ("B", "C. Paris", False),
        ("B", "(B) or (C)", False),
        # Symbolic
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x+1", "(x+2)^2", False),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
        ("7!", "5040", True),
        (r"\sqrt{x^2}", "x", False),  # for negative x
        ("n + m", "n + 1", False),
        (r"2^{n+1}", r"2 \cdot 2^n", True),
        (r"\frac{\pi}{6}", r"\frac{\pi}{3}", False),
        # Names and equations
        ("5", "x=5", True),
        ("x = 5", "5", True),
        ("x = 5", "y = 5", False),
        ("5", "2x = 5", False),
        ("5", "2 + 3 = 5", True),
        ("f(x) = x + 1", "f(t) = t + 1", True),
        ("f(x) = x + 1", "f(t) = t + 2", False),
        ("f(x) = x + 1", "g(x) = x + 1", False),
        ("y = 2x + 1", "2x - y + 1 = 0", True),
        ("y = 2x + 1", "2x + y + 1 = 0", False),
        # Lists and sets: in any order; with names, by name
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("1, 2", "2 and 1", True),
        ("1, 2", "1, 3", False),
        ("1, 2", "1", False),
        ("1", "1, 2", False),  # naming more does not pay
        ("1, 1, 2", "2, 1", True),  # as sets
        ("x = 1, y = 2", "y = 2, x = 1", True),
        ("x = 1, y = 2", "x = 2, y = 1", False),
        ("x = 1, y = 2", "1, 2", True),
        ("x = 1, y = 2", "2, 1", False),
        (r"\pm 1", "1, -1", True),
        (r"\pm 1", "1", False),
        (r"1 \pm \sqrt{2}", r"1 - \sqrt{2}, 1 + \sqrt{2}", True),
        # Tuples and intervals: in this order, pairs with these brackets
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2, 1)", False),
        ("(0, 1)", "[0, 1]", False),
        ("(1, 2, 3)", "(1, 2)", False),
        ("(1, 2)", r"(1, \frac{4}{2})", True),
        ("(a, b) = (1, 2)", "a = 1, b = 2", True),
        (r"(-\infty, 3)", "x < 3", True),
        (r"(-\infty, 3)", r"x \le 3", False),
        (r"(1, 2) \cup (3, 4)", r"(3, 4) \cup (1, 2)", True),
        (r"(1, 2) \cup (3, 4)", r"(1, 2) \cup [3, 4)", False),
        (r"x \in [0, 1]", "[0, 1]", True),
        (r"1 \le x < 2", "[1, 2)", True),
        # Matrices: entry by entry; a column is a tuple
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            r"\begin{bmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{bmatrix}",
            True,
        ),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1, 2)", True),
        # Approximations: a gold decimal and what rounds to it; two values only if one is the other rounded
        (r"\sqrt{2} \approx 1.41", r"\sqrt{2}", True),
        (r"\sqrt{2}", r"\sqrt{2} \approx 1.41", True),
        ("1.41", r"x \approx 1.41", True),
        ("3", r"3 \approx 4", False),
        ("100", r"100 \approx 104", False),
        ("104", r"100 \approx 104", False),
        (r"\frac{2}{3}", r"\frac{2}{3} \approx 0.67", True),
        ("0.6", r"\frac{2}{3} \approx 0.6", True),  # cut off
        ("0.5", r"\frac{2}{3} \approx 0.5", False),
        (r"\frac{19}{6}", r"\frac{19}{6} \approx 3.2", True),
        (r"\frac{19}{6}", r"\frac{19}{6} \approx 3.19", True),  # rounded badly: the fraction is what is meant
        ("3.19", r"\frac{19}{6} \approx 3.19", False),
        (r"\frac{19}{6}", r"\frac{19}{6} \approx 3.5", False),
        ("5", r"5 \text{ or perhaps it might even be } 7", False),
        (r"\emptyset", r"\varnothing", True),
        ("7", "= 7", True),
        (r"\textbf{(B)}\ 42", "B", True),
        (r"\textbf{(B)}\ 42", "C", False),
        ("3", r"4 \approx 3", False),
        ("3", r"2 \approx 3 \approx 4", False),
        ("1.41", r"\sqrt{2}", True),
        ("1.42", r"\sqrt{2}", False),
        # Angles, bases, integer parameters
        (r"30^\circ", r"\frac{\pi}{6}", True),
        (r"30^\circ", r"\frac{\pi}{3}", False),
        (r"30^\circ", "30", True),
        ("204_5", "204_{5}", True),
        ("204_5", "204_6", False),
        (r"\frac{\pi}{6} + 2 \pi k", r"\frac{\pi}{6} + 2 \pi n", True),
        (r"\frac{\pi}{6} + 2 \pi k", r"\frac{\pi}{6} + 2 \pi x", False),
        # Conditions do not count
        ("n + 1", r"n + 1 \text{ for all } n", True),
        # Sentences are not searched for something to parse
        ("4k+3", "those congruent to 3 modulo 4", False),
        ("4", "we are left with just 4 of them here", False),
    ],
)
def test_answers_match(gold: str, prediction: str, match: bool) -> None:
    assert answers_match(gold, prediction) is match


def test_the_comparisons_by_choice() -> None:
    assert COMPARISONS == ("text", "number", "symbolic")
    assert not answers_match("42", "42.0", ["text"])
    assert answers_match("42", "42.0", ["text", "number"])
    assert answers_match("1, 2", "2.0, 1", ["text", "number"])
    assert not answers_match("x + 1", "1 + x", ["text", "number"])
    assert answers_match("x + 1", "1 + x", ["text", "symbolic"])


def test_same_text() -> None:
    assert same_text("$x + 1$", "x+1")
    assert not same_text("1", "1.0")
    assert not same_text("", "")


def test_deep_nesting_is_compared_as_text_only() -> None:
    deep = "(" * 12 + "x" + ")" * 12
    assert answers_match(deep, deep)
    assert not answers_match("x", deep)
