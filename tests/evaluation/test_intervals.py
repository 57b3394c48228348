"""Confidence intervals cover the truth as often as they say, and the paired test is wrong as seldom as it says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from trl_grpo_ext.evaluation import compare_paired, estimate_mean, pass_at_k
from trl_grpo_ext.evaluation.intervals import bootstrap_means, sign_flip_p_value, wilson_interval

EVALUATIONS = 1000
RATES = (0.0, 1.0)


def coverage(
    draw: Callable[[np.random.Generator], np.ndarray],
    truth: float,
    resamples: int = 500,
    bounds: tuple[float, float] | None = RATES,
) -> float:
    """Share of simulated evaluations whose 95 % interval has the truth in it."""
    rng = np.random.default_rng(7)
    found = [estimate_mean(draw(rng), bounds=bounds, resamples=resamples, seed=s) for s in range(EVALUATIONS)]
    return sum(one.low <= truth <= one.high for one in found) / EVALUATIONS


def beta_mean_pass(a: float, b: float, k: int) -> float:
    """E[1 - (1 - p)^k] for p of Beta(a, b): 1 - prod (b + i)/(a + b + i)."""
    return 1 - float(np.prod([(b + i) / (a + b + i) for i in range(k)]))


@pytest.mark.parametrize(
    ("a", "b", "prompts", "n", "k"),
    [
        (1.0, 1.0, 200, 4, 1),  # prompts of every difficulty
        (1.0, 1.0, 200, 4, 4),
        (0.2, 4.0, 200, 4, 1),  # hard ones: 5 % solved
        (0.2, 4.0, 200, 4, 4),
        (0.3, 2.0, 150, 16, 8),
        (1.0, 1.0, 50, 4, 1),  # few prompts
    ],
)
def test_95_percent_intervals_cover_the_truth(a: float, b: float, prompts: int, n: int, k: int) -> None:
    """pass@k of prompts whose pass rates are Beta(a, b): 1,000 evaluations of fresh prompts and completions."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        return pass_at_k(n, rng.binomial(n, rng.beta(a, b, prompts)), k)

    assert 0.93 <= coverage(draw, beta_mean_pass(a, b, k)) <= 0.97


@pytest.mark.parametrize(("prompts", "least"), [(20, 0.92), (50, 0.93)])
def test_lengths_with_a_long_tail_are_covered_with_few_prompts(prompts: int, least: float) -> None:
    """Log-normal, sigma 0.8, with the mean exp(0.8^2 / 2)."""
    found = coverage(lambda rng: rng.lognormal(0.0, 0.8, prompts), float(np.exp(0.32)), bounds=None)
    assert least <= found <= 0.97


def test_where_almost_nothing_is_solved_the_interval_is_too_wide_rather_than_too_narrow() -> None:
    """1 % of 200 prompts: a plain bootstrap covers the truth in fewer than 90 of 100 evaluations."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        return (rng.random(200) < 0.01).astype(float)

    assert coverage(draw, 0.01) >= 0.93
    nothing = estimate_mean(np.zeros(200), bounds=RATES)
    # Wilson's with p = 0: z^2 / (n + z^2) = 3.8415 / 203.8415
    assert (nothing.low, nothing.high) == pytest.approx((0.0, 3.841459 / 203.841459), rel=1e-5)


def test_of_the_difference_too_and_the_test_is_wrong_in_5_percent() -> None:
    """Two policies alike, whose completions are partly the same: 5 % of tests may say that they differ."""
    rng = np.random.default_rng(5)
    covered = wrong = 0
    for seed in range(EVALUATIONS):
        rate = rng.beta(0.5, 0.8, 200)[:, None]
        base = rng.random((200, 4))
        adapter = np.where(rng.random((200, 1)) < 0.4, rng.random((200, 4)), base)
        values = [(noise < rate).mean(axis=1) for noise in (base, adapter)]
        found = compare_paired(*values, bounds=RATES, resamples=500, seed=seed)
        covered += found.low <= 0 <= found.high
        wrong += found.p_value < 0.05
    assert 0.93 <= covered / EVALUATIONS <= 0.97
    assert 0.03 <= wrong / EVALUATIONS <= 0.07


def test_pairing_finds_what_two_intervals_would_not() -> None:
    rng = np.random.default_rng(3)
    base = rng.beta(1, 1, 300)
    adapter = np.clip(base + rng.normal(0.02, 0.03, 300), 0, 1)
    found = compare_paired(base, adapter, bounds=RATES)
    assert found.p_value < 0.001 and 0.01 < found.low < found.mean < found.high < 0.03
    alone = [estimate_mean(x, bounds=RATES) for x in (base, adapter)]
    assert alone[0].high > alone[1].low  # which overlap widely
    assert compare_paired(adapter, base, bounds=RATES).mean == pytest.approx(-found.mean)


def test_sign_flip_against_all_signs() -> None:
    differences = np.array([0.5, 0.25, 0.25, -0.25, 0.0, 1.0, 0.5])
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((-1, 1), repeat=7)]
    exact = np.mean([abs(total) >= 2.25 - 1e-9 for total in sums])
    # 6 that are not 0: |sum| >= 2.25 of 2.75 allows one of the quarters to turn: 3 of 64 plus the whole, both signs
    assert exact == pytest.approx(2 * (1 + 3) / 64)
    assert sign_flip_p_value(differences, resamples=40_000) == pytest.approx(exact, abs=0.005)
    assert sign_flip_p_value(np.zeros(5)) == 1.0
    # Twelve prompts, all better: 2 of 4,096 signs; never 0
    assert 0 < sign_flip_p_value(np.ones(12)) < 0.002


@pytest.mark.parametrize("kinds", [4, 90])
def test_counts_of_kinds_are_resampled_like_the_prompts_themselves(kinds: int) -> None:
    """Mean and variance of the bootstrap means are the sample's, and its variance over n."""
    values = np.random.default_rng(2).integers(kinds, size=60) / kinds
    means = bootstrap_means(values, 40_000, seed=1)
    assert means.shape == (40_000,)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * values.std() / np.sqrt(60 * 40_000))
    assert means.var() == pytest.approx(values.var() / 60, rel=0.04)
    assert (bootstrap_means(values, 500, seed=1) == bootstrap_means(values, 500, seed=1)).all()
    assert (bootstrap_means(values, 500, seed=1) != bootstrap_means(values, 500, seed=2)).any()


def test_edges() -> None:
    assert estimate_mean([3.0]) == estimate_mean([3.0], seed=1)
    one = estimate_mean([3.0])
    assert (one.mean, one.low, one.high, one.prompts) == (3.0, None, None, 1)
    of_a_rate = estimate_mean([1.0], bounds=RATES)
    assert (of_a_rate.low, of_a_rate.high) == pytest.approx(wilson_interval(1.0, 1))
    same = compare_paired([0.5] * 30, [0.5] * 30, bounds=RATES)
    assert same.mean == 0 and same.p_value == 1.0 and same.low == pytest.approx(-same.high) and same.high < 0.2
    with pytest.raises(ValueError, match=r"values from 0\.0 to 2\.0 must lie in"):
        estimate_mean([0.0, 2.0], bounds=RATES)
    with pytest.raises(ValueError, match="one prompt at least"):
        estimate_mean([])
    with pytest.raises(ValueError, match="base has 2 prompts and adapter 3"):
        compare_paired([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match=r"level=1\.5"):
        estimate_mean([0, 1], level=1.5)


def test_wilson_by_hand() -> None:
    # 3 of 10, z = 1.959964, z^2 = 3.841459: (0.3 + 0.1920730 -+ 1.959964 sqrt(0.021 + 0.0096036)) / 1.3841459
    assert wilson_interval(0.3, 10) == pytest.approx((0.1077912, 0.6032219), abs=1e-6)
