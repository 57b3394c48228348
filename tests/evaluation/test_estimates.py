"""pass@k, avg@k and maj@k against numbers by hand, and against going through all subsets."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from trl_grpo_ext.evaluation import avg_at_k, maj_at_k, pass_at_k


def test_pass_at_k_by_hand() -> None:
    # n = 5, c = 2: k = 1: 2/5; k = 2: 1 - C(3,2)/C(5,2) = 1 - 3/10; k = 3: 1 - C(3,3)/C(5,3) = 1 - 1/10; k = 4: 1
    assert [pass_at_k(5, 2, k).item() for k in (1, 2, 3, 4)] == pytest.approx([0.4, 0.7, 0.9, 1.0])
    # Chen et al.'s case of few: n = 200, c = 1, k = 100: 1 - C(199,100)/C(200,100) = 100/200
    assert pass_at_k(200, 1, 100).item() == pytest.approx(0.5)
    assert pass_at_k([4, 4, 4], [0, 4, 3], 2).tolist() == pytest.approx([0.0, 1.0, 1.0])  # 1 - C(1,2)/6
    assert pass_at_k([4, 7], [1, 1], 3).tolist() == pytest.approx([3 / 4, 3 / 7])  # prompts may differ in n


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets(n: int) -> None:
    for c in range(n + 1):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            found = [any(subset) for subset in combinations(right, k)]
            assert pass_at_k(n, c, k).item() == pytest.approx(sum(found) / comb(n, k), abs=1e-12)


def test_pass_at_1_is_avg() -> None:
    n, c = np.array([3, 8, 5]), np.array([1, 0, 5])
    assert avg_at_k(n, c).tolist() == pytest.approx([1 / 3, 0, 1])
    assert pass_at_k(n, c, 1).tolist() == pytest.approx(avg_at_k(n, c).tolist())


def test_pass_at_k_stays_exact_where_the_binomials_would_overflow() -> None:
    # C(10000, 5000) has 3,008 digits. c = 2: 1 - (5000 * 4999) / (10000 * 9999)
    assert pass_at_k(10_000, 2, 5_000).item() == pytest.approx(1 - 5000 * 4999 / (10_000 * 9_999), rel=1e-12)


def test_maj_at_k_by_hand() -> None:
    # Answers a a b, a right. k = 1: 2/3. k = 2: {aa} 1, {ab} twice 1/2 -> (1 + 1)/3. k = 3: a has two of three
    votes, right = [0, 0, 1], [True, True, False]
    assert [maj_at_k(votes, right, k) for k in (1, 2, 3)] == pytest.approx([2 / 3, 2 / 3, 1.0])
    # A tie of three, one of them right
    assert maj_at_k([0, 1, 2], [False, True, False], 3) == pytest.approx(1 / 3)
    # A completion without an answer does not outvote anybody; nothing but those is not right
    assert maj_at_k([None, None, 4], [False, False, True], 3) == 1.0
    assert maj_at_k([None, None], [False, False], 2) == 0.0
    # The majority is wrong: more votes make it worse
    assert maj_at_k([0, 0, 0, 1], [False, False, False, True], 1) == pytest.approx(1 / 4)
    assert maj_at_k([0, 0, 0, 1], [False, False, False, True], 4) == 0.0


def brute_force(votes: list[int | None], right: list[bool], k: int) -> float:
    first = {vote: right[votes.index(vote)] for vote in votes}
    total = 0.0
    for subset in combinations(votes, k):
        counts = {vote: subset.count(vote) for vote in subset if vote is not None}
        leaders = [vote for vote, count in counts.items() if count == max(counts.values())]
        total += sum(first[vote] for vote in leaders) / len(leaders) if leaders else 0.0
    return total / comb(len(votes), k)


def test_maj_at_k_is_the_mean_over_subsets() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 8):
        for _ in range(12):
            votes = [None if v == 4 else int(v) for v in rng.integers(5, size=n)]
            answers = rng.random(5) < 0.5  # several answers may be right
            right = [vote is not None and bool(answers[vote]) for vote in votes]
            for k in range(1, n + 1):
                assert maj_at_k(votes, right, k) == pytest.approx(brute_force(votes, right, k), abs=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k=5 must be in 1\.\.4"):
        pass_at_k([6, 4], [1, 1], 5)
    with pytest.raises(ValueError, match="k=0"):
        pass_at_k(4, 1, 0)
    with pytest.raises(ValueError, match=r"not in 0\.\.n"):
        pass_at_k(4, 5, 1)
    with pytest.raises(ValueError, match=r"k=3 must be in 1\.\.2"):
        maj_at_k([0, 1], [True, False], 3)
