"""How sure a mean over prompts is, and whether two policies differ on the same prompts.

Prompts are what is drawn at random: completions of one prompt are alike, and so everything here takes one value per
prompt. Values of few kinds (pass@1 of 4 completions has 5) are resampled as counts of each kind, which is the same
distribution and many times faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
FEWEST = 10  # prompts that must differ from the rest: resampling fewer shows less than there is
_NORMAL = NormalDist()
_CHUNK = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, and its confidence interval (None: of a single prompt, or of none)."""

    mean: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of adapter less base over the same prompts, its interval, and the paired test's p-value."""

    mean: float
    low: float | None
    high: float | None
    p_value: float
    prompts: int


def estimate_mean(
    values: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean and bootstrap confidence interval over prompts.

    BCa (Efron 1987, "Better Bootstrap Confidence Intervals"), for the mean of a pass rate is skewed where most prompts
    are solved or most are not; with the wider quantiles of Student's t that small samples need (Hesterberg 2015,
    arXiv:1411.5279 §5.3). A 95 % interval of a rate covers the truth in 94 to 96 of 100 evaluations of 50 prompts or
    more (`tests/evaluation/test_intervals.py` simulates them). Without `bounds` (lengths, whose tail may be long) the
    studentised bootstrap is taken (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", §12.5), where at
    least `FEWEST` prompts differ from the rest: each sample's mean is scaled by the sample's own deviation.
    A bootstrap knows nothing of what it has not seen: where fewer than `FEWEST` prompts differ from the rest, and
    `bounds` are known, the interval is Wilson's for that many prompts, which is too wide for values between the bounds
    (rates of several completions). Of zeros and ones alone its coverage goes up and down with P: 90 % where 1 % of 50
    prompts are solved, 95 % of 200.

    Args:
        values: `(P,)` one value per prompt.
        bounds: between which all values must lie, (0, 1) or (-1, 1), if they must.
        level: of confidence, in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: no values, one that is not finite or out of bounds, or a level out of (0, 1).
    """
    x = _checked(values, bounds, level)
    mean, n = float(x.mean()), len(x)
    kinds, counts = np.unique(x, return_counts=True)
    if bounds is not None and n - int(counts.max()) < FEWEST:
        low, high = _by_wilson(x, bounds, level)
        return Estimate(mean, low, high, n)
    if n == 1:
        return Estimate(mean, None, None, n)
    if len(kinds) == 1:  # nothing varies, and what it varies between is not known
        return Estimate(mean, mean, mean, n)
    if bounds is None and n - int(counts.max()) >= FEWEST:
        low, high = _by_studentised_means(x, level, resamples, seed)
        return Estimate(mean, low, high, n)
    means = bootstrap_means(x, resamples, seed)
    low, high = np.quantile(means, _bca_levels(x, means, level)).tolist()
    return Estimate(mean, low, high, n)


def compare_paired(
    base: ArrayLike,
    adapter: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Whether two policies differ on the same prompts: difference, interval, and p-value.

    The interval is that of `estimate_mean` for the differences of the prompts. The p-value is of a two-sided sign-flip
    permutation test: were the policies alike, each prompt's difference could as well have had the other sign. With the
    same noise for both, completions that the adapter does not change cancel exactly, so that far smaller differences
    are seen than by comparing two separate evaluations.

    Args:
        base, adapter: `(P,)` one value per prompt, of the same prompts in the same order.
        bounds: between which the values of either must lie, such as (0, 1), if they must.
        level, resamples, seed: as in `estimate_mean`; as many signs are drawn as means.

    Raises:
        ValueError: as in `estimate_mean`, or the lengths differ.
    """
    a, b = np.asarray(base, float), np.asarray(adapter, float)
    if a.shape != b.shape:
        raise ValueError(f"base has {len(a)} prompts and adapter {len(b)}: compare both on the same ones")
    width = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    found = estimate_mean(b - a, bounds=width, level=level, resamples=resamples, seed=seed)
    p_value = sign_flip_p_value(b - a, resamples=resamples, seed=seed)
    return Difference(found.mean, found.low, found.high, p_value, found.prompts)


def sign_flip_p_value(differences: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference of 0: how often random signs give one at least as far from 0.

    `(1 + #{|sum of s_i d_i| >= |sum of d_i|}) / (1 + resamples)`, the observed signs being one of the samples (Phipson
    and Smyth 2010, arXiv:1603.05766): never 0, and never too small on average.

    Args:
        differences: `(P,)`.
        resamples: draws of all signs.
        seed: of the signs.
    """
    d = _checked(differences, None, 0.95)
    sizes, counts = np.unique(np.abs(d[d != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    rng = np.random.default_rng([seed, 1])
    observed = abs(float(d.sum()))
    slack = 1e-9 * float(np.abs(d).sum())  # sums of the same numbers in another order are the same
    extreme = 0
    for count in _chunks(resamples, len(sizes)):
        plus = rng.binomial(counts, 0.5, size=(count, len(sizes)))
        extreme += int((np.abs((2 * plus - counts) @ sizes) >= observed - slack).sum())
    return (1 + extreme) / (1 + resamples)


def bootstrap_means(values: Floats, resamples: int, seed: int) -> Floats:
    """`(resamples,)` means of samples as large as `values`, drawn from them with replacement."""
    kinds, counts = np.unique(values, return_counts=True)
    rng, n = np.random.default_rng([seed, 0]), len(values)
    means = []
    for count in _chunks(resamples, min(len(kinds) * 4, n)):
        if len(kinds) * 4 < n:
            means.append(rng.multinomial(n, counts / n, size=count) @ kinds / n)
        else:
            means.append(values[rng.integers(n, size=(count, n))].mean(axis=1))
    return np.concatenate(means)


def wilson_interval(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share of `n` trials.

    `(p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)`. Of values anywhere in [0, 1] with that mean it is
    too wide, as none vary more than zeros and ones do.
    """
    z = _NORMAL.inv_cdf((1 + level) / 2)
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    centre, scale = share + z**2 / (2 * n), 1 + z**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _by_wilson(x: Floats, bounds: tuple[float, float], level: float) -> tuple[float, float]:
    """Of values in [0, w]; in [-w, w], the positive and the negative parts have half of the error each."""
    low, high = bounds
    n, width = len(x), max(abs(low), abs(high))
    if low >= 0:
        bottom, top = wilson_interval(float((x.mean() - low) / (high - low)), n, level)
        return low + bottom * (high - low), low + top * (high - low)
    half = (1 + level) / 2
    up = wilson_interval(float(np.maximum(x, 0).mean() / width), n, half)
    down = wilson_interval(float(np.maximum(-x, 0).mean() / width), n, half)
    return (up[0] - down[1]) * width, (up[1] - down[0]) * width


def _by_studentised_means(x: Floats, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """`mean - q s`, q the outer quantiles of the samples' `(mean* - mean) / s*`, of those samples that vary."""
    rng, n = np.random.default_rng([seed, 0]), len(x)
    ratios = []
    for count in _chunks(resamples, n):
        drawn = x[rng.integers(n, size=(count, n))]
        spread = drawn.std(axis=1)
        vary = spread > 1e-12 * max(1.0, float(np.abs(x).max()))
        ratios.append((drawn.mean(axis=1)[vary] - x.mean()) / spread[vary])
    bottom, top = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return float(x.mean() - top * x.std()), float(x.mean() - bottom * x.std())


def _bca_levels(x: Floats, means: Floats, level: float) -> list[float]:
    """Which quantiles of the bootstrap means the interval's ends are."""
    n, deviation = len(x), x - x.mean()
    acceleration = float((deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5))
    near = 1e-12 * max(1.0, float(np.abs(x).max()))
    below = float((means < x.mean() - near).mean() + 0.5 * (np.abs(means - x.mean()) <= near).mean())
    bias = _NORMAL.inv_cdf(min(max(below, 1 / len(means)), 1 - 1 / len(means)))
    z = _NORMAL.inv_cdf((1 + level) / 2)
    # Student's quantile with n - 1 degrees of freedom, to the first order (Cornish and Fisher), and the bootstrap's own
    # variance, which divides by n
    z *= (1 + (z**2 + 1) / (4 * (n - 1))) * math.sqrt(n / (n - 1))
    return [_NORMAL.cdf(bias + (bias + end) / (1 - acceleration * (bias + end))) for end in (-z, z)]


def _checked(values: ArrayLike, bounds: tuple[float, float] | None, level: float) -> Floats:
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"values of shape {x.shape} must be one finite number per prompt, and of one prompt at least")
    if bounds is not None and (x.min() < bounds[0] - 1e-9 or x.max() > bounds[1] + 1e-9):
        raise ValueError(f"values from {x.min()} to {x.max()} must lie in {list(bounds)}: pass other bounds, or none")
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must be in (0, 1): 0.95 is usual")
    return x


def _chunks(resamples: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK // max(1, width))
    for start in range(0, resamples, size):
        yield min(size, resamples - start)
