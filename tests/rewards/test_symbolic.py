r"""The symbolic comparison, and the guard in front of it."""

from __future__ import annotations

import threading
from decimal import Decimal

import pytest

from trl_grpo_ext.rewards import symbolic, worker
from trl_grpo_ext.rewards.symbolic import is_costly, is_hostile, numeric_value, symbolically_equal


@pytest.mark.parametrize(
    ("gold", "prediction", "equal"),
    [
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+x+1", False),
        (r"\sin^2 x + \cos^2 x", "1", True),
        (r"\log_2 8", "3", True),
        (r"\frac{a}{b}", r"\frac{b}{a}", False),
        (r"\binom{5}{2}", "10", True),
        ("x^2 + y^2 = 1", "y^2 + x^2 = 1", True),
        (r"\sqrt{x^2}", "x", False),
        ("(-1)^n", "(-1)^{n+2}", True),
        ("", "", False),
        (r"\frac{", "1", False),
    ],
)
@pytest.mark.parametrize("in_thread", [False, True], ids=["main", "thread"])
def test_symbolically_equal(gold: str, prediction: str, equal: bool, in_thread: bool) -> None:
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.append(symbolically_equal(gold, prediction)))
    if in_thread:
        thread.start()
        thread.join()
    else:
        thread.run()
    assert verdicts == [equal]


@pytest.mark.parametrize(
    "text",
    ["2^{2024}", "x^{100} + 1", r"(x+1)^{10}", r"(a-b)^2(b-c)^2(c-a)^2", r"\frac{7!}{16}", r"\sqrt{a^2b^2 + c^2}",
     "e^{-x}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", r"\cos^2 x", "x \\neq 3", "5!", "n!", "(n-1)!", "10!",
     r"\binom{10}{5}"],
)  # fmt: skip
def test_real_answers_are_not_refused(text: str) -> None:
    assert not is_hostile(text)


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9}}", "x^{1000}", "2^{99999}", "100!", "5!!", "(50!)!", "50!^{99}", r"\binom{99999}{5000}",
     r"\sum_{k=1}^{1000} k", r"\Gamma(99)", "1" * 65, "x" * 513, "(" * 11 + ")" * 11],
)  # fmt: skip
def test_hostile_answers_are(text: str) -> None:
    assert is_hostile(text)


def test_costly_answers_are_those_to_be_multiplied_out() -> None:
    assert is_costly("(a+b+c+d)^{10}")
    assert is_costly(r"\sin x" * 7)
    assert not is_costly("(a+b)^{10}")


def test_numeric_value() -> None:
    value = numeric_value(r"17 + 10\sqrt{6}")
    assert value is not None
    assert abs(value - Decimal("41.494897427831780981972840747")) < Decimal("1e-25")
    assert numeric_value("x + 1") is None
    assert numeric_value("9^{9^{9}}") is None


def test_the_template_of_the_reward_workers_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for functions of this name in the modules that it has imported."""
    calls = []
    monkeypatch.setattr(symbolic, "warm_up", lambda: calls.append("symbolic"))
    worker._warm_up()
    assert calls == ["symbolic"]
    monkeypatch.undo()
    symbolic.warm_up()  # the real one runs
