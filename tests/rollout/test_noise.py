"""Every completion has its own stream of uniforms, whatever it is drawn together with."""

import math

import pytest
import torch

from trl_grpo_ext.rollout.noise import uniform_rows

WORD = 2**64 - 1


def philox4x64(counter, key):
    """Four 64-bit words of Philox4x64-10 (Salmon et al. 2011, §3.3), in plain integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & WORD, (p0 >> 64) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("seed", "step", "prompt", "completion"), [(0, 0, 0, 0), (7, 3, 5, 2), (2**40, 12, 1, 2**33), (2**63, 0, 9, 0)]
)
def test_the_scheme_is_philox_keyed_by_seed_and_step(seed, step, prompt, completion):
    row = uniform_rows(seed, step, [prompt], [completion], 11)[0].tolist()
    words = [word for block in (1, 2, 3) for word in philox4x64((block, completion, prompt, 0), (seed, step))]
    assert row == [(word >> 11) * 2.0**-53 for word in words[:11]]


def test_the_numbers_of_one_key():
    """Pinned: another scheme would draw other rollouts for the same seed."""
    assert uniform_rows(7, 3, [5], [2], 5)[0].tolist() == [
        0.25345495079215974,
        0.4765556897802805,
        0.4946977826014338,
        0.3832063955603696,
        0.04487248494704277,
    ]


def test_a_row_does_not_depend_on_its_company():
    keys = [(p, g) for p in range(3) for g in range(5)]
    together = uniform_rows(1, 2, [p for p, _ in keys], [g for _, g in keys], 7)
    assert together.shape == (15, 7)
    assert together.dtype == torch.float64
    for chosen in ([4], [14, 0, 7], list(reversed(range(15)))):
        apart = uniform_rows(1, 2, [keys[i][0] for i in chosen], [keys[i][1] for i in chosen], 7)
        assert torch.equal(apart, together[chosen])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_a_shorter_row_is_the_start_of_a_longer_one(length):
    longer = uniform_rows(1, 2, [3, 4], [0, 1], 10)
    assert torch.equal(uniform_rows(1, 2, [3, 4], [0, 1], length), longer[:, :length])


def test_every_part_of_the_key_matters():
    rows = [
        uniform_rows(seed, step, [prompt], [completion], 100)[0]
        for seed in (0, 1)
        for step in (0, 1)
        for prompt in (0, 1)
        for completion in (0, 1)
    ]
    values = torch.cat(rows)
    assert len(values.unique()) == len(values) == 1600  # no stream is another one, shifted


def test_uniform_and_independent():
    """20,000 numbers; bounds at more than 4 standard deviations, and the seed is fixed."""
    rows = uniform_rows(0, 0, [p for p in range(20) for _ in range(10)], [g for _ in range(20) for g in range(10)], 100)
    assert rows.min() >= 0
    assert rows.max() < 1
    # Mean 1/2 and variance 1/12; the mean of n has standard deviation sqrt(1 / 12 / n) = 0.00204
    assert abs(rows.mean() - 0.5) < 0.0082
    # The squared deviation has mean 1/12 and standard deviation sqrt(1/80 - 1/144) = 0.0745
    assert abs(rows.var() - 1 / 12) < 4 * 0.0745 / math.sqrt(20_000)
    # Ten bins of 2,000: chi-squared with 9 degrees of freedom is above 27.9 once in a thousand times
    counts = torch.histc(rows, 10, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9
    # Neighbours in a row, and the same place of neighbouring rows
    for a, b in ((rows[:, :-1], rows[:, 1:]), (rows[:-1], rows[1:])):
        correlation = ((a - 0.5) * (b - 0.5)).mean() * 12
        assert abs(correlation) < 4 / math.sqrt(a.numel())
