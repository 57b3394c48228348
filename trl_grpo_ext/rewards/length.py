"""Length rewards: a window of characters, DAPO's soft overlong penalty and the cosine schedule, these two by TRL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trl_grpo_ext.rewards.marks import is_in_process, is_row_wise, quick, row_wise
from trl_grpo_ext.rewards.text import completion_text

# What TRL's own accuracy check is asked, once we know the answer
_ANSWER, _OTHER_ANSWER, _NO_GOLD = r"\boxed{1}", r"\boxed{0}", ""


@quick
@row_wise
class LengthReward:
    """1.0 for a completion of more than `min_chars` and fewer than `max_chars` characters, else 0.0.

    The length part of R1-style format rewards, which give it a weight of 0.3 there. Spaces count, thinking counts.

    Raises:
        ValueError: no length lies between the two, or `min_chars` is negative.
    """

    __name__ = "length_reward"

    def __init__(self, min_chars: int = 100, max_chars: int = 2000) -> None:
        _check_count("min_chars", min_chars, at_least=0)
        _check_count("max_chars", max_chars, at_least=min_chars + 2)
        self.min_chars, self.max_chars = min_chars, max_chars

    def __call__(self, completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """`B` rewards, each 0.0 or 1.0, of `B` completions, each a string or a list of messages."""
        lengths = [len(completion_text(completion)) for completion in completions]
        return [1.0 if self.min_chars < length < self.max_chars else 0.0 for length in lengths]


def soft_overlong_reward(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), TRL's `get_soft_overlong_punishment`.

    With `n` tokens in the completion, `L` the first and `c` the second argument:

        r = 0                  if n <= L - c
            (L - c - n) / c    if L - c < n <= L
            -1                 if n > L

    With the trainer's `max_completion_length` as `max_completion_len`, a completion that was cut off earns -1 (0 if `c`
    is 0, which leaves nothing to punish).

    Raises:
        ValueError: `max_completion_len` below 1, or `soft_punish_cache` not between 0 and it.
    """
    from trl.rewards.other_rewards import get_soft_overlong_punishment

    _check_count("max_completion_len", max_completion_len, at_least=1)
    _check_count("soft_punish_cache", soft_punish_cache, at_least=0, at_most=max_completion_len)
    return quick(get_soft_overlong_punishment(max_completion_len, soft_punish_cache))


class CosineLengthReward:
    """Correctness scaled by length (arXiv:2502.03373, App. C.1), by TRL's `get_cosine_scaled_reward`.

    With `n` tokens in the completion and `L = max_len`:

        r = low + (high - low) / 2 * (1 + cos(pi * min(n / L, 1)))

    where from short to long a right answer goes from `max_value_correct` down to `min_value_correct`, and a wrong one
    from `min_value_wrong` up to `max_value_wrong`.

    The schedule is TRL's; who is right is for `accuracy` to say, so that conversational and standard completions, gold
    answers in any of the dataset's forms and answers made to hang a parser are treated as everywhere in this package.

    Args:
        max_len: tokens of completion at which the schedule ends.
        min_value_wrong, max_value_wrong, min_value_correct, max_value_correct: see above; the defaults are TRL's.
        accuracy: a reward function; a completion counts as right from 1.0 on, and None stays None. By default
            `accuracy_reward`, which reads the gold answer from the column `solution` or `answer`.

    Raises:
        ValueError: `max_len` below 1.
        TypeError: `accuracy` is not callable.
    """

    __name__ = "cosine_length_reward"

    def __init__(
        self,
        max_len: int,
        min_value_wrong: float = -1.0,
        max_value_wrong: float = -0.5,
        min_value_correct: float = 0.5,
        max_value_correct: float = 1.0,
        accuracy: Callable[..., Sequence[float | None]] | None = None,
    ) -> None:
        from trl.rewards.accuracy_rewards import get_cosine_scaled_reward

        from trl_grpo_ext.rewards.accuracy import accuracy_reward

        _check_count("max_len", max_len, at_least=1)
        if accuracy is not None and not callable(accuracy):
            raise TypeError(f"`accuracy` must be a reward function, got {type(accuracy).__name__}: {accuracy!r:.200}")
        self.accuracy = accuracy_reward if accuracy is None else accuracy
        self.schedule = get_cosine_scaled_reward(
            max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct
        )
        self.reward_is_row_wise = is_row_wise(self.accuracy)
        self.reward_runs_in_process = is_in_process(self.accuracy)

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        """`B` rewards, or None where `accuracy` says None.

        Args:
            completions: `B` completions, each a string or a list of messages.
            completion_ids: their tokens, of which only the number counts.
            **columns: the dataset's columns and whatever else a trainer passes, for `accuracy`.
        """
        right = self.accuracy(completions=completions, completion_ids=completion_ids, **columns)
        # TRL's function judges for itself, so it is shown an answer that is as right or wrong as the real one
        shown = [_ANSWER if value is not None and value >= 1 else _OTHER_ANSWER for value in right]
        rewards: list[float | None] = self.schedule(
            completions=[[{"role": "assistant", "content": answer}] for answer in shown],
            solution=[_NO_GOLD if value is None else _ANSWER for value in right],
            completion_ids=completion_ids,
        )
        return rewards


def _check_count(field: str, value: int, *, at_least: int, at_most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{field}` must be a whole number, got {type(value).__name__}: {value!r:.200}")
    if value < at_least or (at_most is not None and value > at_most):
        rule = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"`{field}` is {value}: it must be {rule}.")
