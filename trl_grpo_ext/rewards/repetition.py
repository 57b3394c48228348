"""A penalty for completions that repeat themselves, by TRL."""

from __future__ import annotations

from collections.abc import Callable

from trl_grpo_ext.rewards.marks import quick


def repetition_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """Penalty for repeated n-grams of tokens (arXiv:2502.03373, App. C.2), TRL's `get_repetition_penalty_reward`.

        r = (1 - number of different n-grams / number of n-grams) * max_penalty

    0.0 for a completion of fewer than `ngram_size` tokens. What comes back is picklable and is logged as
    `repetition_penalty_reward`.

    Args:
        ngram_size: tokens in an n-gram.
        max_penalty: what a completion of nothing but repetition comes close to.

    Raises:
        ValueError: `ngram_size` below 1, or a `max_penalty` above 0.
        TypeError: `ngram_size` is not a whole number.
    """
    from trl.rewards.other_rewards import get_repetition_penalty_reward

    if isinstance(ngram_size, bool) or not isinstance(ngram_size, int):
        raise TypeError(f"`ngram_size` must be a whole number, got {type(ngram_size).__name__}: {ngram_size!r:.200}")
    if ngram_size < 1:
        raise ValueError(f"`ngram_size` is {ngram_size}: it must be at least 1.")
    if not max_penalty <= 0:  # TRL lets NaN through
        raise ValueError(f"`max_penalty` is {max_penalty}: it must be 0 or less, as it is a penalty.")
    return quick(get_repetition_penalty_reward(ngram_size, max_penalty))
