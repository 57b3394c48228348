r"""The accuracy reward of DeepSeek-R1 (arXiv:2501.12948, §2.2.2): is the final answer the gold one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_grpo_ext.rewards.equivalence import COMPARISONS, answers_match, same_text
from trl_grpo_ext.rewards.extraction import (
    EXTRACT_FROM,
    after_thinking,
    extract_gold,
    extract_prediction,
    is_marked,
)
from trl_grpo_ext.rewards.formulas import MAX_ANSWER_CHARS
from trl_grpo_ext.rewards.marks import row_wise
from trl_grpo_ext.rewards.text import completion_text

GOLD_COLUMNS = ("solution", "answer")


class AccuracyReward:
    r"""1.0 where a completion's final answer equals the gold answer, 0.0 where not, None where there is no gold.

    The answer is looked for in the places `extract_from` names, in that order, and compared with the gold one by the
    comparisons `compare` names: as text, as exact numbers and part by part, and at last symbolically by math-verify
    (`extraction.extract_prediction` and `equivalence.answers_match` say exactly how). A completion that is the gold
    answer as text, and nothing else, is right wherever the answer is looked for. A completion without any answer earns
    0.0, and so does one that answers only inside its thinking, before a `</think>` with nothing after it.

    Safe against hostile answers (`9^{9^{9^{9}}}`, `99999999!`): see `symbolic.is_hostile`. Works in any thread.

    Args:
        extract_from: places, of `extraction.EXTRACT_FROM`; ("answer_tag",), say, to pay for answers in their tag only.
        compare: comparisons, of `equivalence.COMPARISONS`, always the cheapest first; "text" is always among them.
        gold_columns: the dataset columns that may hold the gold answer, in the dataset's own form: a plain answer or
            number, GSM8K's `... #### 42`, a text with `\boxed{...}`, or `<answer>..</answer>`: see
            `extraction.extract_gold`. A row's gold is that of the first column with a marked or short answer (a worked
            solution in prose is passed over if a later column has one).

    Raises:
        ValueError: an option is empty or names something that does not exist.
    """

    __name__ = "accuracy_reward"
    reward_is_row_wise = True

    def __init__(
        self,
        extract_from: Sequence[str] = EXTRACT_FROM,
        compare: Sequence[str] = COMPARISONS,
        gold_columns: Sequence[str] = GOLD_COLUMNS,
    ) -> None:
        for name, value, known in (("extract_from", extract_from, EXTRACT_FROM), ("compare", compare, COMPARISONS)):
            unknown = [item for item in value if item not in known]
            if unknown or not value or isinstance(value, str):
                raise ValueError(f"`{name}` is {value!r}: give one or more of {known}, in a list.")
        if not gold_columns or isinstance(gold_columns, str):
            raise ValueError(f"`gold_columns` is {gold_columns!r}: give a list of one or more dataset columns.")
        self.extract_from, self.compare, self.gold_columns = tuple(extract_from), tuple(compare), tuple(gold_columns)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Rewards of `B` completions, each a string or a list of messages (the last assistant message is judged).

        Args:
            completions: `B` completions.
            **columns: the dataset's columns, `B` values each, of which the gold ones are read; the rest is ignored.

        Returns:
            `B` rewards: 1.0, 0.0, or None (the row then has no say in the group's baseline).

        Raises:
            ValueError: there is none of the gold columns, or its length differs from the number of completions.
            TypeError: a gold value is neither text nor a number.
        """
        found = {name: columns[name] for name in self.gold_columns if columns.get(name) is not None}
        if not found:
            names = " nor ".join(f"`{name}`" for name in self.gold_columns)
            raise ValueError(
                f"accuracy_reward found neither {names} among the columns to compare with: add one of them to the "
                f"dataset, or name the column that holds the gold answers: AccuracyReward(gold_columns=[...])."
            )
        for name, column in found.items():
            if len(column) != len(completions):
                raise ValueError(
                    f"`{name}` has {len(column)} values for {len(completions)} completions; need one for each."
                )
        golds = [gold_answer(row) for row in zip(*found.values(), strict=True)]
        return [
            None if gold is None else float(self._is_right(completion_text(completion), gold))
            for completion, gold in zip(completions, golds, strict=True)
        ]

    def _is_right(self, text: str, gold: str) -> bool:
        whole = after_thinking(text).strip()
        if len(whole) <= MAX_ANSWER_CHARS and same_text(gold, whole):
            return True
        prediction = extract_prediction(text, self.extract_from)
        return prediction is not None and answers_match(gold, prediction, self.compare)


_DEFAULT = AccuracyReward()


@row_wise
def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 where a completion's final answer equals the gold answer of its row, 0.0 where not, None without a gold one.

    `AccuracyReward` with its defaults, which says where answers are looked for and how they are compared.

    Args:
        completions: `B` completions, each a string or a list of messages (the last assistant message is judged).
        solution: the dataset's `solution` column, `B` values.
        answer: the dataset's `answer` column, `B` values; read where `solution` holds no gold answer.
        **kwargs: whatever else a trainer passes; ignored.

    Returns:
        `B` rewards: 1.0, 0.0, or None (the row then has no say in the group's baseline).

    Raises:
        ValueError: neither column is given, or a column's length differs from the number of completions.
        TypeError: a gold value is neither text nor a number.
    """
    return _DEFAULT(completions, solution=solution, answer=answer)


def gold_answer(values: Sequence[Any]) -> str | None:
    """The gold answer of one row: of the first value that marks it or is short, or else of the first that holds any."""
    texts = [_gold_text(value) for value in values]
    candidates = [(text, extract_gold(text)) for text in texts if text is not None]
    golds = [(text, gold) for text, gold in candidates if gold is not None]
    return next((gold for text, gold in golds if is_marked(text)), golds[0][1] if golds else None)


def _gold_text(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise TypeError(
            f"a gold answer must be text or a number, got {type(value).__name__}: {value!r:.200}. "
            f"Convert the column before training."
        )
    missing = value is None or value != value  # NaN: how a table marks an empty cell
    return None if missing else str(value)
