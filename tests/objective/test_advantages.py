import math

import pytest
import torch

from trl_grpo_ext.objective import (
    AGGREGATORS,
    combine_rewards,
    group_advantages,
    normalize_then_sum_advantages,
)

NAN = math.nan
EPS = 1e-4


def close(actual: torch.Tensor, expected: list[float], atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=atol, rtol=1e-6)


# --- the worked numbers of the literature ---


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # mean 0, population std sqrt(4 / 4) = 1
        ([1.0, -1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0]),
        # mean 0.75, variance (3 * 0.25^2 + 0.75^2) / 4 = 0.1875, std 0.4330; 0.25 / 0.4330 = 0.577, -0.75 / 0.4330
        ([1.0, 1.0, 0.0, 1.0], [0.57735, 0.57735, -1.73205, 0.57735]),
    ],
)
def test_population_std(rewards, expected):
    advantages = group_advantages(torch.tensor(rewards), 4, correction=0, eps=0.0)
    close(advantages.values, expected, atol=1e-5)


def test_centred_only():
    # mean (90 + 70 + 85 + 75) / 4 = 80
    advantages = group_advantages(torch.tensor([90.0, 70.0, 85.0, 75.0]), 4, scale="none")
    close(advantages.values, [10.0, -10.0, 5.0, -5.0])
    # The std is reported all the same: sqrt((100 + 100 + 25 + 25) / 3)
    close(advantages.std, [math.sqrt(250 / 3)] * 4, atol=1e-5)


# --- P=2 groups of G=3 ---

REWARDS = [1.0, 2.0, 6.0, 0.0, 0.0, 3.0]
# Group 1: mean 3, deviations -2, -1, 3, sum of squares 14. Group 2: mean 1, deviations -1, -1, 2, sum of squares 6.


def test_sample_std_of_each_group():
    std = [math.sqrt(14 / 2)] * 3 + [math.sqrt(6 / 2)] * 3
    advantages = group_advantages(torch.tensor(REWARDS), 3)
    close(advantages.std, std)
    close(advantages.values, [d / (s + EPS) for d, s in zip([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0], std, strict=True)])
    assert advantages.zero_std.tolist() == [False] * 6


def test_eps_is_added_to_the_std_not_to_the_variance():
    # mean 1, std sqrt(2) (sample, two values): (2 - 1) / (sqrt(2) + 0.5), not / sqrt(2 + 0.5)
    advantages = group_advantages(torch.tensor([0.0, 2.0]), 2, eps=0.5)
    close(advantages.values, [-1 / (math.sqrt(2) + 0.5), 1 / (math.sqrt(2) + 0.5)])


def test_batch_std_with_group_means():
    # Batch: mean 12 / 6 = 2, squares of deviations 1 + 0 + 16 + 4 + 4 + 1 = 26, std sqrt(26 / 5)
    std = math.sqrt(26 / 5)
    advantages = group_advantages(torch.tensor(REWARDS), 3, scale="batch")
    close(advantages.std, [std] * 6)
    close(advantages.values, [d / (std + EPS) for d in [-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]])


def test_a_missing_reward_gets_no_advantage_and_moves_nobody():
    # Group 1 without its second: mean (1 + 6) / 2 = 3.5, deviations -2.5, 2.5, std sqrt(12.5 / 1)
    advantages = group_advantages(torch.tensor([1.0, NAN, 6.0, 0.0, 0.0, 3.0]), 3)
    std = math.sqrt(12.5)
    close(advantages.values[:3], [-2.5 / (std + EPS), 0.0, 2.5 / (std + EPS)])
    assert advantages.values[1].item() == 0.0
    # The other group is as if alone.
    assert torch.equal(advantages.values[3:], group_advantages(torch.tensor(REWARDS), 3).values[3:])


def test_a_missing_reward_is_outside_the_batch_std():
    # 1, 6, 0, 0, 3: mean 2, squares 1 + 16 + 4 + 4 + 1 = 26, std sqrt(26 / 4)
    advantages = group_advantages(torch.tensor([1.0, NAN, 6.0, 0.0, 0.0, 3.0]), 3, scale="batch")
    close(advantages.std, [math.sqrt(26 / 4)] * 6)
    close(advantages.values[:3], [-2.5 / (math.sqrt(6.5) + EPS), 0.0, 2.5 / (math.sqrt(6.5) + EPS)])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [[0.1, 0.1, 0.1], [0.1, NAN, 0.1], [0.7, NAN, NAN], [NAN, NAN, NAN]])
def test_a_group_without_spread_is_exactly_zero(scale, group):
    advantages = group_advantages(torch.tensor([*group, 0.0, 1.0, 5.0]), 3, scale=scale)
    assert advantages.values[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages.values[3:].ne(0).all()
    if scale != "batch":
        assert advantages.std[:3].tolist() == [0.0, 0.0, 0.0]
        assert advantages.zero_std.tolist() == [True] * 3 + [False] * 3


def test_the_formula_alone_would_leave_rounding_noise():
    # Guards the test above: with these numbers the zeros are not what the arithmetic gives.
    rewards = torch.full((7,), 0.1)
    assert ((rewards - rewards.nanmean()) / (rewards.std() + EPS)).abs().max() > 0
    assert rewards.std() > 0
    advantages = group_advantages(rewards, 7)
    assert advantages.values.tolist() == advantages.std.tolist() == [0.0] * 7


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_one_generation_per_prompt_in_evaluation(scale):
    advantages = group_advantages(torch.tensor([3.0, 5.0]), 1, scale=scale)
    assert advantages.values.tolist() == [0.0, 0.0]
    # A batch has a spread even if its groups have none: mean 4, std sqrt(2 / 1).
    close(advantages.std, [math.sqrt(2)] * 2 if scale == "batch" else [0.0, 0.0])
    lone = group_advantages(torch.tensor([3.0]), 1, scale=scale)
    assert (lone.values.item(), lone.std.item(), lone.zero_std.item()) == (0.0, 0.0, True)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"num_generations=4 does not divide the 6 rewards"):
        group_advantages(torch.tensor(REWARDS), 4)
    with pytest.raises(ValueError, match=r"num_generations=0"):
        group_advantages(torch.tensor(REWARDS), 0)
    with pytest.raises(ValueError, match=r"scale_rewards='std'.*'group', 'batch', 'none'"):
        group_advantages(torch.tensor(REWARDS), 3, scale="std")


# --- several reward functions ---


def test_combine_rewards_is_a_weighted_sum_of_those_that_answered():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 3.0], [4.0, NAN], [NAN, NAN]])
    # 1 * 0.5 + 2 * 10; 3 * 10; 4 * 0.5; nobody
    combined = combine_rewards(rewards, torch.tensor([0.5, 10.0]))
    assert combined[:3].tolist() == [20.5, 30.0, 2.0]
    assert combined[3].isnan()


def test_combine_rewards_refuses_weights_that_would_broadcast():
    with pytest.raises(ValueError, match=r"weights has shape \(1,\)"):
        combine_rewards(torch.ones(3, 2), torch.ones(1))


def test_sum_then_normalize_is_the_two_steps_in_turn():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 1.0], [6.0, NAN], [0.0, 2.0], [NAN, NAN], [3.0, 0.5]])
    weights = torch.tensor([1.0, 3.0])
    for scale in ("group", "batch", "none"):
        expected = group_advantages(combine_rewards(rewards, weights), 3, scale=scale)
        actual = AGGREGATORS["sum_then_normalize"](rewards, weights, 3, scale=scale)
        assert torch.equal(actual.values, expected.values)
        assert torch.equal(actual.std, expected.std)


def test_normalize_then_sum_by_hand():
    # P=1, G=3, K=2, eps=0. Column 1: 0, 0, 3: mean 1, std sqrt(6 / 2) = 1.7321 -> -0.57735, -0.57735, 1.15470
    # Column 2: 10, 20, 30: mean 20, std 10 -> -1, 0, 1
    # Weights 1, 2: s = -2.57735, -0.57735, 3.15470 (sum 0)
    # std(s) = sqrt((6.64273 + 0.33333 + 9.95214) / 2) = sqrt(8.46410) = 2.90931
    rewards = torch.tensor([[0.0, 10.0], [0.0, 20.0], [3.0, 30.0]])
    advantages = normalize_then_sum_advantages(rewards, torch.tensor([1.0, 2.0]), 3, eps=0.0)
    close(advantages.std, [2.90931] * 3, atol=1e-5)
    close(advantages.values, [-2.57735 / 2.90931, -0.57735 / 2.90931, 3.15470 / 2.90931], atol=1e-5)


def test_normalize_then_sum_leaves_constant_and_missing_rewards_at_exactly_zero():
    # Group 1 is constant in both columns, group 2 misses its second row, and one value of its third.
    rewards = torch.tensor([[0.1, 0.7], [0.1, 0.7], [0.1, 0.7], [0.3, 1.1], [NAN, NAN], [2.2, NAN]])
    advantages = normalize_then_sum_advantages(rewards, torch.tensor([1.0, 2.0]), 3)
    assert advantages.values[[0, 1, 2, 4]].tolist() == [0.0] * 4
    assert advantages.values[[3, 5]].ne(0).all()
    assert advantages.values.isfinite().all()


def test_normalize_then_sum_takes_no_rounding_noise_from_a_constant_reward():
    # 0.1 seven times deviates from its float32 mean; a constant reward must add exactly nothing, as 0 does.
    varying = torch.arange(7.0).unsqueeze(1)
    noisy, quiet = torch.full((7, 1), 0.1), torch.zeros(7, 1)
    values = [
        normalize_then_sum_advantages(torch.cat([varying, constant], dim=1), torch.tensor([1.0, 1e3]), 7).values
        for constant in (noisy, quiet)
    ]
    assert torch.equal(*values)


def test_normalize_then_sum_with_one_generation():
    advantages = normalize_then_sum_advantages(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.ones(2), 1)
    assert advantages.values.tolist() == [0.0, 0.0]
    assert advantages.zero_std.tolist() == [True, True]


def test_a_large_reward_drowns_a_small_one_only_when_summed_first():
    # The first two completions differ only in a reward a hundred times smaller than the other.
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 100.0]])
    summed = AGGREGATORS["sum_then_normalize"](rewards, torch.ones(2), 3, scale="group").values
    normalised = AGGREGATORS["normalize_then_sum"](rewards, torch.ones(2), 3, scale="group").values
    assert (summed[1] - summed[0]).item() < 0.02
    assert (normalised[1] - normalised[0]).item() > 1.0
