"""What one prompt's `n` completions say about drawing `k` of them: pass@k, avg@k, maj@k.

Every estimate is the mean over all subsets of `k` of the `n` completions, computed without going through them, and so
an unbiased estimate of what `k` fresh completions would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def pass_at_k(n: ArrayLike, right: ArrayLike, k: int) -> Floats:
    """Probability that at least one of `k` completions is right (Chen et al. 2021, arXiv:2107.03374 §2.1).

        pass@k = 1 - C(n - c, k) / C(n, k),  computed as  1 - prod_{i = n-c+1..n} (1 - k / i)

    Args:
        n: `(P,)` completions drawn for each prompt.
        right: `(P,)` how many of them are right, c.
        k: how many are drawn at a time.

    Returns:
        `(P,)` estimates in [0, 1].

    Raises:
        ValueError: `k` is below 1 or above an `n`, or a count is not in 0..n.
    """
    drawn, correct = np.broadcast_arrays(np.atleast_1d(np.asarray(n, int)), np.atleast_1d(np.asarray(right, int)))
    _check(drawn, correct, k)
    failing = np.ones(drawn.shape)
    # One factor per right completion, all prompts at a time: i goes from n down to n - c + 1
    for j in range(int(correct.max(initial=0))):
        i = drawn - j
        factor = np.where(j < correct, np.clip(1.0 - k / np.maximum(i, 1), 0.0, 1.0), 1.0)
        failing = failing * factor
    return np.asarray(1.0 - failing, float)


def avg_at_k(n: ArrayLike, right: ArrayLike) -> Floats:
    """Share of right completions, `c / n`: what pass@1 estimates, and avg@k for every `k`.

    Args:
        n, right: `(P,)` as in `pass_at_k`.

    Returns:
        `(P,)` shares.

    Raises:
        ValueError: as in `pass_at_k` with k = 1.
    """
    drawn, correct = np.broadcast_arrays(np.atleast_1d(np.asarray(n, int)), np.atleast_1d(np.asarray(right, int)))
    _check(drawn, correct, 1)
    return np.asarray(correct / drawn, float)


def maj_at_k(votes: Sequence[int | None], right: Sequence[bool], k: int) -> float:
    """Probability that the most frequent answer of `k` completions is right (self-consistency, arXiv:2203.11171).

    The mean over all subsets of `k` of the `n` completions. Where several answers are the most frequent ones, one of
    them is taken at random, and its expected value counts: two of which one is right are worth 1/2. A completion
    without an answer has no vote; `k` such completions are not right.

    Args:
        votes: n numbers, the same for the same answer; None for none.
        right: n judgements. Of completions with the same answer the first one's counts for all of them.
        k: how many vote.

    Raises:
        ValueError: `k` is below 1 or above n, or the lengths differ.
    """
    n = len(votes)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(f"k={k} must be in 1..{n}, with {len(right)} judgements of {n} votes: draw more completions")
    judged: dict[int, bool] = {}
    counts: dict[int, int] = {}
    for vote, verdict in zip(votes, right, strict=True):
        if vote is not None:
            judged.setdefault(vote, verdict)
            counts[vote] = counts.get(vote, 0) + 1
    silent = n - sum(counts.values())
    total = 0.0
    for answer in (answer for answer, verdict in judged.items() if verdict):
        others = [count for other, count in counts.items() if other != answer]
        for most in range(1, min(k, counts[answer]) + 1):
            ways = comb(counts[answer], most)
            for ties, subsets in enumerate(_subsets(others, silent, k - most, most)):
                total += ways * subsets / (ties + 1)
    return float(total / comb(n, k))


def _subsets(others: Sequence[int], silent: int, size: int, most: int) -> list[int]:
    """Ways to choose `size` of the other completions so that no answer has more than `most`; index: how many tie."""
    ways = [[0] * (size + 1) for _ in range(len(others) + 1)]  # [answers that tie][completions chosen]
    for chosen in range(min(size, silent) + 1):
        ways[0][chosen] = comb(silent, chosen)
    for number, count in enumerate(others):
        grown = [[0] * (size + 1) for _ in ways]
        for ties in range(number + 1):
            for chosen, before in enumerate(ways[ties]):
                if before:
                    for more in range(min(count, most, size - chosen) + 1):
                        grown[ties + (more == most)][chosen + more] += before * comb(count, more)
        ways = grown
    return [row[size] for row in ways]


def _check(drawn: NDArray[np.int_], correct: NDArray[np.int_], k: int) -> None:
    if k < 1 or (drawn < k).any():
        raise ValueError(f"k={k} must be in 1..{drawn.min(initial=k)}, the completions of a prompt: draw more of them")
    if (correct < 0).any() or (correct > drawn).any():
        raise ValueError("a number of right completions is not in 0..n: count those of the same n completions")
