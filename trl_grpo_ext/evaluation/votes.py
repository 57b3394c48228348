"""Which of a prompt's completions give the same answer: what they vote for in maj@k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_grpo_ext.rewards.equivalence import COMPARISONS, answers_match
from trl_grpo_ext.rewards.extraction import EXTRACT_FROM, extract_prediction
from trl_grpo_ext.rewards.notation import normalise, squeezed

Pair = tuple[str, str]


class SameAnswer:
    """1.0 where two answers are the same by `rewards.equivalence.answers_match`, else 0.0.

    In the form of a reward function, so that it runs where rewards run: in workers, with a time limit.

    Args:
        compare: as in `AccuracyReward`.
    """

    __name__ = "same_answer"
    reward_is_row_wise = True

    def __init__(self, compare: Sequence[str] = COMPARISONS) -> None:
        self.compare = tuple(compare)

    def __call__(self, completions: Sequence[str], other: Sequence[str], **kwargs: Any) -> list[float]:
        """Judge `B` pairs of answers, `completions` and `other`."""
        return [float(answers_match(a, b, self.compare)) for a, b in zip(other, completions, strict=True)]


def extract_answers(texts: Sequence[str], extract_from: Sequence[str] = EXTRACT_FROM) -> list[str | None]:
    """Each completion's final answer as it is written; None where it states none."""
    return [extract_prediction(text, extract_from) for text in texts]


def undecided_pairs(answers: Sequence[str | None]) -> list[Pair]:
    """Pairs of one prompt's answers that differ as text, and may be the same nevertheless; each once, sorted."""
    texts = list(_first_of_each(answers).values())
    return [(first, second) for number, first in enumerate(texts) for second in texts[number + 1 :]]


def vote(answers: Sequence[str | None], same: set[Pair]) -> list[int | None]:
    """One number per completion of a prompt, equal for equal answers, in the order in which answers come up.

    An answer is compared with the first of each that came before it.

    Args:
        answers: one prompt's, in the order in which completions were drawn.
        same: those of `undecided_pairs` that are the same.
    """
    first_of = _first_of_each(answers)
    numbers: dict[str, int] = {}
    leaders: list[str] = []
    for key, text in first_of.items():
        known = next((number for number, leader in enumerate(leaders) if (leader, text) in same), None)
        if known is None:
            known = len(leaders)
            leaders.append(text)
        numbers[key] = known
    return [None if answer is None else numbers[_key(answer)] for answer in answers]


def _first_of_each(answers: Sequence[str | None]) -> dict[str, str]:
    """The answers that differ as text, as they were first written."""
    found: dict[str, str] = {}
    for answer in answers:
        if answer is not None:
            found.setdefault(_key(answer), answer)
    return found


def _key(answer: str) -> str:
    return squeezed(normalise(answer))
