r"""The accuracy reward of DeepSeek-R1 (arXiv:2501.12948, §2.2.2): is the final answer the gold one?

Three comparisons, the cheapest first: as text, as exact numbers, and symbolically with math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trl_grpo_ext.rewards.extraction import extract_gold, extract_prediction, is_prose, last_number
from trl_grpo_ext.rewards.marks import row_wise
from trl_grpo_ext.rewards.numeric import normalise, parse_quantity, same_quantity
from trl_grpo_ext.rewards.symbolic import symbolically_equal
from trl_grpo_ext.rewards.text import completion_text

_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ -][^\W\d_]+)*")
_CHOICE = re.compile(r"\(([A-Za-z])\)")


@row_wise
def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where a completion's final answer equals the gold answer, 0.0 where not, None where there is no gold.

    The gold answer is the row's `solution`, or else its `answer` (also where a row's `solution` holds none), in the
    dataset's own form: a plain answer or number, GSM8K's `... #### 42`, a text with `\boxed{...}`, or
    `<answer>..</answer>`. See `extraction.extract_gold`; and `extraction.extract_prediction` for where in a completion
    the answer is looked for. A completion without any answer earns 0.0, and so does one that answers only inside its
    thinking.

    Safe against hostile answers (`9^{9^{9^{9}}}`, `99999999!`): see `symbolic.is_hostile`. Works in any thread.

    Args:
        completions: `B` completions, each a string or a list of messages (the last assistant message is judged).
        solution: the dataset's `solution` column, `B` values.
        answer: the dataset's `answer` column, `B` values; read if there is no `solution`.
        **kwargs: whatever else a trainer passes; ignored.

    Returns:
        `B` rewards: 1.0, 0.0, or None (the row then has no say in the group's baseline).

    Raises:
        ValueError: neither column is given, or a column's length differs from the number of completions.
        TypeError: a gold value is neither text nor a number.
    """
    if solution is None and answer is None:
        raise ValueError(
            "accuracy_reward found neither a `solution` nor an `answer` column to compare with: add one of them to the "
            "dataset, or rename the column that holds the gold answers."
        )
    for name, column in (("solution", solution), ("answer", answer)):
        if column is not None and len(column) != len(completions):
            raise ValueError(
                f"`{name}` has {len(column)} values for {len(completions)} completions; need one for each."
            )
    columns = [column for column in (solution, answer) if column is not None]
    golds = [_first_gold(row) for row in zip(*columns, strict=True)]
    return [
        None if gold is None else _reward(completion_text(completion), gold)
        for completion, gold in zip(completions, golds, strict=True)
    ]


def answers_match(gold: str, prediction: str) -> bool:
    r"""Whether two extracted answers are the same: as normalised text, as exact numbers, or by math-verify.

    As text: white space, math delimiters and `\text{}` do not count, nor does the case of words. As numbers: see
    `numeric.same_quantity`; two numbers that clearly differ are not handed on to math-verify.
    """
    gold_text, prediction_text = normalise(gold), normalise(prediction)
    if _comparable(gold_text) == _comparable(prediction_text):
        return bool(gold_text)
    gold_number, prediction_number = parse_quantity(gold_text), parse_quantity(prediction_text)
    if gold_number is not None and prediction_number is not None:
        same = same_quantity(gold_number, prediction_number)
        if same is not None:
            return same
    if _is_sentence(prediction) or _is_sentence(gold):
        # math-verify would search a sentence for anything to parse; the one thing we accept in it is its last number.
        number = parse_quantity(last_number(prediction_text) or "")
        return gold_number is not None and number is not None and same_quantity(gold_number, number) is True
    return symbolically_equal(gold, prediction)


def _reward(text: str, gold: str) -> float:
    prediction = extract_prediction(text)
    return 1.0 if prediction is not None and answers_match(gold, prediction) else 0.0


def _first_gold(row: tuple[Any, ...]) -> str | None:
    for value in row:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
            raise TypeError(
                f"a gold answer must be text or a number, got {type(value).__name__}: {value!r:.200}. "
                f"Convert the column before training."
            )
        missing = value is None or value != value  # NaN: how a table marks an empty cell
        gold = None if missing else extract_gold(str(value))
        if gold is not None:
            return gold
    return None


def _is_sentence(text: str) -> bool:
    return is_prose(text) and not any(opening in text for opening in ("$", r"\(", r"\["))


def _comparable(text: str) -> str:
    choice = _CHOICE.fullmatch(text)
    if choice:
        return choice[1]
    return text.casefold() if _WORDS.fullmatch(text) else text
