"""The countdown reward: an equation that uses the given numbers once each and hits the target.

The task of TinyZero's reproduction of R1-Zero (github.com/Jiayi-Pan/TinyZero). Equations are read by a parser of its
own, with exact fractions, never by `eval`; it keeps its own stack, so that nesting cannot exhaust Python's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from trl_grpo_ext.rewards.boxes import has_box, last_boxed
from trl_grpo_ext.rewards.extraction import EXTRACT_FROM, after_thinking, extract_prediction, last_answer_block
from trl_grpo_ext.rewards.marks import row_wise
from trl_grpo_ext.rewards.notation import normalise
from trl_grpo_ext.rewards.text import completion_text

NUMBERS_COLUMNS = ("nums", "numbers")
MAX_EQUATION_CHARS = 512
_MAX_DIGITS = 18  # of one number, so that values stay small
_TOKEN = re.compile(r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<sign>[-+*/()])|(?P<end>$))")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


class CountdownReward:
    """1.0 for an equation that makes the target of the given numbers, 0.0 for anything else, None without a task.

    The equation is the whole of the answer: numbers, `+ - * /` (or `×`, `÷`, and their LaTeX names), brackets, and
    optionally `= target`. Each given number must be used exactly once (as often as it is given), and no other number.

    Args:
        extract_from: where the answer is looked for, of `extraction.EXTRACT_FROM`; in its tag only by default.
        use_all: with False, numbers may be left out.

    Raises:
        ValueError: `extract_from` is empty or names a place that does not exist.
    """

    __name__ = "countdown_reward"
    reward_is_row_wise = True

    def __init__(self, extract_from: Sequence[str] = ("answer_tag",), use_all: bool = True) -> None:
        if (
            not extract_from
            or isinstance(extract_from, str)
            or any(place not in EXTRACT_FROM for place in extract_from)
        ):
            raise ValueError(f"`extract_from` is {extract_from!r}: give one or more of {EXTRACT_FROM}, in a list.")
        self.extract_from, self.use_all = tuple(extract_from), use_all

    def __call__(
        self, completions: Sequence[Any], target: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """Rewards of `B` completions.

        Args:
            completions: `B` completions, each a string or a list of messages (the last assistant message is judged).
            target: the dataset's `target` column, `B` numbers.
            **columns: of which `nums` or `numbers` holds `B` lists of numbers; the rest is ignored.

        Returns:
            `B` rewards: 1.0, 0.0, or None where the target or the numbers are None.

        Raises:
            ValueError: there is no `target`, or neither `nums` nor `numbers`, or their lengths differ from `B`, or one
                of their values is no number.
        """
        name = next((name for name in NUMBERS_COLUMNS if columns.get(name) is not None), None)
        if name is None or target is None:
            raise ValueError(
                f"countdown_reward needs the columns `target` and one of {NUMBERS_COLUMNS}, got "
                f"{sorted([*columns, *([] if target is None else ['target'])])}: rename the dataset's columns."
            )
        for column, values in (("target", target), (name, columns[name])):
            if len(values) != len(completions):
                raise ValueError(
                    f"`{column}` has {len(values)} values for {len(completions)} completions; need one for each."
                )
        return [
            None if numbers is None or goal is None else self._reward(completion_text(completion), name, numbers, goal)
            for completion, numbers, goal in zip(completions, columns[name], target, strict=True)
        ]

    def _reward(self, text: str, name: str, numbers: Sequence[Any], target: Any) -> float:
        given, goal = Counter(abs(_number(name, number)) for number in numbers), _number("target", target)
        answer = _answer(text, self.extract_from)
        equation = None if answer is None else evaluate(answer)
        if equation is None:
            return 0.0
        value, used = equation
        fits = used == given if self.use_all else bool(used) and used <= given
        return float(fits and value == goal)


_DEFAULT = CountdownReward()


@row_wise
def countdown_reward(
    completions: Sequence[Any], target: Sequence[Any] | None = None, **kwargs: Any
) -> list[float | None]:
    """1.0 where the `<answer>` is an equation that uses each number of `nums` once and equals `target`; see above.

    `CountdownReward` with its defaults: columns `target` and `nums` or `numbers`.
    """
    return _DEFAULT(completions, target=target, **kwargs)


def evaluate(equation: str) -> tuple[Fraction, Counter[Fraction]] | None:
    """The value of an equation and the numbers in it; None if it is anything but arithmetic, or too long.

    `= number` may follow, and must then be right. No powers, no division by zero. Time is linear in the length.
    """
    if len(equation) > MAX_EQUATION_CHARS:
        return None
    sides = _plain(equation).split("=")
    left = _evaluate(sides[0])
    if left is None or len(sides) > 2:
        return None
    if len(sides) == 2:
        right = _evaluate(sides[1])
        if right is None or right[0] != left[0]:
            return None
    return left


def _evaluate(expression: str) -> tuple[Fraction, Counter[Fraction]] | None:
    """Shunting-yard: values and operators on two stacks; an operator waits for those of higher priority after it."""
    values: list[Fraction] = []
    waiting: list[str] = []
    used: Counter[Fraction] = Counter()
    operand_expected = True
    position = 0
    while position < len(expression):
        token = _TOKEN.match(expression, position)
        if token is None:
            return None
        position = token.end()
        number, sign = token["number"], token["sign"]
        if number:
            if not operand_expected or len(number) > _MAX_DIGITS:
                return None
            values.append(Fraction(number))
            used[values[-1]] += 1
            operand_expected = False
        elif sign == "(":
            if not operand_expected:
                return None
            waiting.append(sign)
        elif sign == ")":
            if operand_expected or not _apply(values, waiting, lambda top: top != "(") or not waiting:
                return None
            waiting.pop()
        elif sign:
            operator = "negate" if operand_expected and sign == "-" else sign
            if operand_expected and operator != "negate":
                return None
            if operator != "negate" and not _apply(values, waiting, _not_before(operator)):
                return None
            waiting.append(operator)
            operand_expected = True
    if operand_expected or not _apply(values, waiting, lambda top: True) or len(values) != 1:
        return None
    return values[0], used


def _not_before(operator: str) -> Callable[[str], bool]:
    return lambda top: top != "(" and _PRIORITY[top] >= _PRIORITY[operator]


def _apply(values: list[Fraction], waiting: list[str], is_due: Callable[[str], bool]) -> bool:
    """Carry out the operators at the top of the stack that are due; False if one cannot be."""
    while waiting and is_due(waiting[-1]):
        operator = waiting.pop()
        if operator == "negate":
            values.append(-values.pop())
            continue
        if operator == "(":
            return False
        b, a = values.pop(), values.pop()
        if operator == "/" and b == 0:
            return False
        values.append(_OPERATIONS[operator](a, b))
    return True


_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def _answer(text: str, extract_from: Sequence[str]) -> str | None:
    # Not narrowed: an equation must be all there is in the tag.
    block = last_answer_block(after_thinking(text)) if "answer_tag" in extract_from else None
    if block and has_box(block) and block.startswith(("\\boxed", "$")) and block.endswith(("}", "$")):
        block = last_boxed(block) or block
    others = [place for place in extract_from if place != "answer_tag"]
    return block or (extract_prediction(text, others) if others else None)


def _plain(equation: str) -> str:
    text = normalise(equation)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", re.sub(r"\\div(?![A-Za-z])", "/", text))
    return _FRACTION.sub(r"((\1)/(\2))", text)


def _number(column: str, value: Any) -> Fraction:
    try:
        return Fraction(str(value.item() if hasattr(value, "item") else value).strip())
    except ValueError:
        raise ValueError(
            f"`{column}` holds {value!r:.200}, which is no number: convert the column before training."
        ) from None
