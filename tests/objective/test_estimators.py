"""Baselines beside the group-relative one, with the numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trl_grpo_ext.objective import (
    ADVANTAGE_ESTIMATORS,
    group_advantages,
    raft_advantages,
    reinforce_advantages,
    remax_advantages,
    rloo_advantages,
)

NAN = math.nan

# P=2 groups of G=3
REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
# Groups of four, three and one rewards, filled up with NaN
UNEQUAL = torch.tensor([1.0, 2.0, 6.0, 3.0, 0.0, NAN, 4.0, 0.5, NAN, 5.0, NAN, NAN])
GREEDY = torch.tensor([2.0, 1.0])


def close(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-6, rtol=1e-6)


# --- RLOO ---


def test_rloo_leaves_one_out():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; 0 - (0 + 3) / 2 twice, 3 - 0
    advantages = rloo_advantages(REWARDS, 3)
    close(advantages.values, [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0])
    # Group 1: mean 3, squares 4 + 1 + 9 = 14; group 2: mean 1, squares 1 + 1 + 4 = 6
    close(advantages.std, [math.sqrt(14 / 2)] * 3 + [math.sqrt(6 / 2)] * 3)


def test_rloo_is_the_centred_advantage_times_n_over_n_minus_one():
    close(rloo_advantages(REWARDS, 3).values, (group_advantages(REWARDS, 3, scale="none").values * 3 / 2).tolist())


def test_rloo_with_unequal_groups():
    advantages = rloo_advantages(UNEQUAL, 4)
    # 1 - 11/3, 2 - 10/3, 6 - 6/3, 3 - 9/3; 0 - 4.5/2, None, 4 - 0.5/2, 0.5 - 4/2; the third group has nobody to leave
    close(advantages.values, [-8 / 3, -4 / 3, 4.0, 0.0, -2.25, 0.0, 3.75, -1.5, 0.0, 0.0, 0.0, 0.0])
    assert advantages.values[5] == 0
    assert advantages.zero_std.tolist() == [False] * 8 + [True] * 4


# --- ReMax ---


def test_remax_subtracts_the_greedy_reward():
    # Group 1 minus 2, group 2 minus 1
    advantages = remax_advantages(REWARDS, GREEDY, 3)
    assert advantages.values.tolist() == [-1.0, 0.0, 4.0, -1.0, -1.0, 2.0]
    close(advantages.std, [math.sqrt(14 / 2)] * 3 + [math.sqrt(6 / 2)] * 3)


def test_remax_with_unequal_groups_and_a_missing_baseline():
    advantages = remax_advantages(UNEQUAL, torch.tensor([3.0, NAN, 1.0]), 4)
    # Group 2 has no baseline; group 3 has one reward, and a signal all the same: 5 - 1
    assert advantages.values.tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0]


def test_remax_has_a_signal_in_a_group_without_spread():
    values = remax_advantages(torch.tensor([1.0, 1.0, 0.1, 0.1]), torch.tensor([0.0, 0.1]), 2).values
    assert values.tolist() == [1.0, 1.0, 0.0, 0.0]


# --- RAFT ---


def test_raft_takes_the_best_only():
    advantages = raft_advantages(REWARDS, 3)
    assert advantages.values.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    close(advantages.std, [math.sqrt(14 / 2)] * 3 + [math.sqrt(6 / 2)] * 3)


def test_raft_takes_the_first_of_the_tied():
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, NAN, 0.0, -2.0, -2.0, -5.0, NAN])
    assert raft_advantages(rewards, 5).values.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_raft_with_unequal_groups():
    # Of one there is no best
    assert raft_advantages(UNEQUAL, 4).values.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


# --- REINFORCE ---


def test_reinforce_subtracts_the_mean_of_the_batch():
    # 12 / 6 = 2
    advantages = reinforce_advantages(REWARDS, 3)
    assert advantages.values.tolist() == [-1.0, 0.0, 4.0, -2.0, -2.0, 1.0]
    # squares 1 + 0 + 16 + 4 + 4 + 1 = 26
    close(advantages.std, [math.sqrt(26 / 5)] * 6)


def test_reinforce_with_unequal_groups():
    # (1 + 2 + 6 + 3 + 0 + 4 + 0.5 + 5) / 8 = 21.5 / 8 = 2.6875
    values = reinforce_advantages(UNEQUAL, 4).values
    close(values, [-1.6875, -0.6875, 3.3125, 0.3125, -2.6875, 0.0, 1.3125, -2.1875, 0.0, 2.3125, 0.0, 0.0])
    assert values[[5, 8, 10, 11]].tolist() == [0.0] * 4


def test_reinforce_has_a_signal_in_groups_without_spread_but_not_in_a_batch_without():
    # Mean 0.5
    assert reinforce_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), 2).values.tolist() == [0.5, 0.5, -0.5, -0.5]
    seven = torch.full((7,), 0.1)
    assert (seven - seven.nanmean()).abs().max() > 0  # what the formula alone gives
    advantages = reinforce_advantages(seven, 7)
    assert advantages.values.tolist() == advantages.std.tolist() == [0.0] * 7
    assert advantages.zero_std.all()


# --- all of them ---


@pytest.mark.parametrize("estimate", [rloo_advantages, raft_advantages])
@pytest.mark.parametrize(
    "group", [[0.1] * 7, [0.1, NAN, 0.1, NAN, NAN, NAN, 0.1], [0.7, *[NAN] * 6], [NAN] * 7], ids=str
)
def test_a_group_without_spread_is_exactly_zero(estimate, group):
    advantages = estimate(torch.tensor([*group, *range(7)]), 7)
    assert advantages.values[:7].tolist() == advantages.std[:7].tolist() == [0.0] * 7
    assert advantages.values[7:].any()
    assert advantages.zero_std.tolist() == [True] * 7 + [False] * 7


def test_all_rewards_missing():
    nothing = torch.full((4,), NAN)
    for name, estimate in ADVANTAGE_ESTIMATORS.items():
        advantages = estimate(nothing, 2, greedy_rewards=torch.tensor([0.0, 1.0]))
        assert advantages.values.tolist() == [0.0] * 4, name


def test_the_table_holds_the_functions():
    assert list(ADVANTAGE_ESTIMATORS) == ["group", "rloo", "remax", "raft", "reinforce"]
    direct = {
        "group": group_advantages(REWARDS, 3, scale="none"),
        "rloo": rloo_advantages(REWARDS, 3),
        "remax": remax_advantages(REWARDS, GREEDY, 3),
        "raft": raft_advantages(REWARDS, 3),
        "reinforce": reinforce_advantages(REWARDS, 3),
    }
    for name, expected in direct.items():
        advantages = ADVANTAGE_ESTIMATORS[name](REWARDS, 3, scale="none", greedy_rewards=GREEDY)
        assert torch.equal(advantages.values, expected.values)
        assert torch.equal(advantages.std, expected.std)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"advantage_estimator='ppo'.*'group', 'rloo', 'remax', 'raft', 'reinforce'"):
        ADVANTAGE_ESTIMATORS["ppo"]
    with pytest.raises(ValueError, match=r"advantage_estimator='remax' needs greedy_rewards"):
        ADVANTAGE_ESTIMATORS["remax"](REWARDS, 3)
    with pytest.raises(ValueError, match=r"greedy_rewards has shape \(6,\): it must be \(2,\)"):
        remax_advantages(REWARDS, REWARDS, 3)
    for name, estimate in ADVANTAGE_ESTIMATORS.items():
        with pytest.raises(ValueError, match=r"num_generations=4 does not divide the 6 rewards"):
            estimate(REWARDS, 4, greedy_rewards=GREEDY)
        assert name
