"""The multiple-choice reward: is the option that a completion chooses the right one?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_grpo_ext.rewards.boxes import last_boxed
from trl_grpo_ext.rewards.equivalence import answers_match, same_text
from trl_grpo_ext.rewards.extraction import after_answer_is, after_hashes, after_thinking, last_answer_block
from trl_grpo_ext.rewards.formulas import MAX_ANSWER_CHARS
from trl_grpo_ext.rewards.marks import row_wise
from trl_grpo_ext.rewards.notation import normalise, words_kept
from trl_grpo_ext.rewards.text import completion_text

LETTERS = "ABCDEFGHIJ"
GOLD_COLUMNS = ("solution", "answer")
_LIST = re.compile(r"\(?([A-Za-z])\)?(?:\s*(?:,|and|&|,\s*and)\s*\(?[A-Za-z]\)?)*")
_LABELLED = re.compile(r"(?:(?:option|choice|answer)\s+)?(?:\(([A-Za-z])\)|([A-Za-z])[).:\]])(?:\s|$)", re.IGNORECASE)
_CHOSEN = re.compile(r"\b(?:option|choice)\s*(?:is|:)[\s*_:]*(?P<named>[^\n]*)", re.IGNORECASE)
_IS_RIGHT = re.compile(
    r"(?<![\w'’-])(?:option|choice|answer)?\s*\(?(?P<named>[A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
)
_NAMED = re.compile(r"(?:option|choice)\s+\(?([A-Za-z])\b", re.IGNORECASE)
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_ALONE = re.compile(r"(?<![\w'’-])([B-HJ-Z])(?![\w'’-])")  # "A" and "I" are words


class MultipleChoiceReward:
    """1.0 where a completion chooses the right option, 0.0 where it does not or chooses none, None without a gold one.

    The choice is read from what follows the thinking: the last `<answer>..</answer>`, else the last box, what follows
    `####`, what follows "the answer is" or "the correct option is", what is said to be correct, the last line if it is
    nothing but a choice, or the last letter in brackets. It may be a letter (`B`, `(b)`, `B. Paris`, `option B`),
    several (`A and C`, right only if all are and no other), or, with a column of options, the text of one. A choice
    that names more options than the gold one is wrong, so that naming all of them does not pay.

    Args:
        letters: what the options are called, in order.
        choices_column: the dataset column with each row's options, a list of texts; it may be absent.
        first_index: which option an integer gold value of this size means: 0 in datasets like MMLU.

    Raises:
        ValueError: `letters` are not different capital letters.
    """

    __name__ = "multiple_choice_reward"
    reward_is_row_wise = True

    def __init__(self, letters: str = LETTERS, choices_column: str = "choices", first_index: int = 0) -> None:
        if not letters or len(set(letters)) != len(letters) or not re.fullmatch("[A-Z]+", letters):
            raise ValueError(f"`letters` is {letters!r}: give different capital letters, as in {LETTERS!r}.")
        self.letters, self.choices_column, self.first_index = letters, choices_column, first_index

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Rewards of `B` completions.

        Args:
            completions: `B` completions, each a string or a list of messages (the last assistant message is judged).
            **columns: of which `solution`, or else `answer`, holds the right options (a letter, letters, an index, or
                an option's text), and `choices_column` the options; the rest is ignored.

        Returns:
            `B` rewards: 1.0, 0.0, or None where the gold value is None or blank.

        Raises:
            ValueError: there is neither of the gold columns, a length differs from `B`, or a gold value is no option.
        """
        name = next((name for name in GOLD_COLUMNS if columns.get(name) is not None), None)
        if name is None:
            raise ValueError(
                "multiple_choice_reward found neither a `solution` nor an `answer` column with the right options: add "
                "one of them to the dataset, or rename the column that holds them."
            )
        options = columns.get(self.choices_column) or [None] * len(completions)
        for column, values in ((name, columns[name]), (self.choices_column, options)):
            if len(values) != len(completions):
                raise ValueError(
                    f"`{column}` has {len(values)} values for {len(completions)} completions; need one for each."
                )
        return [
            self._reward(completion_text(completion), name, gold, self._texts(texts))
            for completion, gold, texts in zip(completions, columns[name], options, strict=True)
        ]

    def _texts(self, options: Any) -> Sequence[str]:
        """The options' texts; ARC keeps them as `{"text": [...], "label": [...]}`."""
        texts = options.get("text") if isinstance(options, Mapping) else options or []
        if not isinstance(texts, Sequence) or isinstance(texts, str):
            raise TypeError(
                f"`{self.choices_column}` holds {options!r:.200}: each row needs a list of the options' texts, or a "
                "dict with such a list under 'text'."
            )
        return texts

    def _reward(self, text: str, column: str, gold: Any, options: Sequence[str]) -> float | None:
        if gold is None or not str(gold).strip():
            return None
        letters = self.letters[: len(options)] if options else self.letters
        right = self._gold(column, gold, options, letters)
        return float(_choice(after_thinking(text), options, letters) == right)

    def _gold(self, column: str, gold: Any, options: Sequence[str], letters: str) -> frozenset[str]:
        if isinstance(gold, int) and not isinstance(gold, bool):
            index = gold - self.first_index
            right = frozenset(letters[index : index + 1]) if index >= 0 else frozenset()
        else:
            text = last_boxed(str(gold)) or str(gold)
            right = _stated(text, options, letters)
            if (
                not right
                and re.fullmatch("[A-Z]{2,}", text.strip())
                and list(text.strip()) == sorted(set(text.strip()))
            ):
                right = frozenset(text.strip()) & frozenset(letters)  # "AC"
        if not right:
            raise ValueError(
                f"`{column}` holds {gold!r:.200}, which is none of the options {letters!r}: give a letter, an index, "
                f"or an option's text together with a `{self.choices_column}` column."
            )
        return right


_DEFAULT = MultipleChoiceReward()


@row_wise
def multiple_choice_reward(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1.0 where a completion chooses the right option (columns `solution` or `answer`, and `choices` if there is one).

    `MultipleChoiceReward` with its defaults, which says how choices and gold values are read.
    """
    return _DEFAULT(completions, **kwargs)


def _choice(text: str, options: Sequence[str], letters: str) -> frozenset[str]:
    block = last_answer_block(text)
    if block is not None:
        return _stated(block, options, letters)
    for place in (last_boxed, after_hashes, after_answer_is, _after_option_is, _before_is_right):
        statement = place(text)
        chosen = _stated(statement, options, letters) if statement else frozenset()
        if chosen:
            return chosen
    last_line = text.rstrip().rpartition("\n")[2]
    whole = _whole(last_line, options, letters)
    if whole:
        return whole
    in_brackets = [letter for letter in _IN_BRACKETS.findall(text) if letter in letters]
    return frozenset(in_brackets[-1:])


def _after_option_is(text: str) -> str | None:
    named = [match["named"] for match in _CHOSEN.finditer(text)]
    return named[-1] if named else None


def _before_is_right(text: str) -> str | None:
    named = [match["named"] for match in _IS_RIGHT.finditer(text)]
    return named[-1] if named else None


def _stated(statement: str, options: Sequence[str], letters: str) -> frozenset[str]:
    """The options that a statement of the answer names."""
    if len(statement) > MAX_ANSWER_CHARS:
        statement = after_answer_is(statement) or statement[-MAX_ANSWER_CHARS:]
    whole = _whole(statement, options, letters)
    if whole:
        return whole
    text = words_kept(normalise(statement))
    for pattern in (_NAMED, _IN_BRACKETS, _ALONE):
        named = frozenset(letter.upper() for letter in pattern.findall(text)) & frozenset(letters)
        if named:
            return named
    return frozenset()


def _whole(statement: str, options: Sequence[str], letters: str) -> frozenset[str]:
    """The options, if the statement is nothing but their letters, an option's text, or both."""
    if len(statement) > MAX_ANSWER_CHARS:
        return frozenset()
    text = words_kept(normalise(statement.strip(" \t*_")))
    if _LIST.fullmatch(text):
        named = frozenset(letter.upper() for letter in re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", text))
        return named if named <= frozenset(letters) else frozenset()
    equal = [letter for letter, option in zip(letters, options, strict=False) if same_text(str(option), statement)]
    if not equal:
        equal = [letter for letter, option in zip(letters, options, strict=False) if _same(str(option), statement)]
    if equal:
        return frozenset(equal[:1])
    label = _LABELLED.match(text)
    letter = (label[1] or label[2]).upper() if label else ""
    others = {other for other in _IN_BRACKETS.findall(text[label.end() :]) if other in letters} if label else set()
    return frozenset(letter) if letter and letter in letters and others <= {letter} else frozenset()


def _same(option: str, statement: str) -> bool:
    # Without math-verify: two options that are equal as formulas would be one question too many for a reward
    return answers_match(option, statement, compare=("text", "number"))
