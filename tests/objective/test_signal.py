"""Which groups have a policy gradient."""

import pytest
import torch

from trl_grpo_ext.objective import group_advantages, groups_with_signal, normalize_then_sum_advantages

NAN = torch.nan
# P=4 groups of G=3, K=2 rewards
REWARDS = torch.tensor(
    [
        [1.0, 0.0], [0.0, 1.0], [1.0, 0.0],  # each differs, the sums do not
        [1.0, 0.5], [1.0, 0.5], [1.0, 0.5],  # all equal
        [1.0, 0.5], [1.0, NAN], [1.0, 0.5],  # one without the second reward: sums 1.5, 1, 1.5
        [NAN, NAN], [NAN, NAN], [0.0, 1.0],  # one completion alone has rewards
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "separately", "expected"),
    [
        ([1.0, 1.0], False, [False, False, True, False]),
        ([1.0, 1.0], True, [True, False, False, False]),
        ([2.0, 1.0], False, [True, False, True, False]),  # 2, 1, 2
        ([1.0, 0.0], False, [True, False, False, False]),  # of the first reward alone
        ([0.0, 1.0], True, [True, False, False, False]),
        ([0.0, 0.0], False, [False, False, False, False]),
        ([0.0, 0.0], True, [False, False, False, False]),
    ],
)
def test_groups_with_signal(weights, separately, expected):
    found = groups_with_signal(REWARDS, torch.tensor(weights), 3, separately=separately)
    assert found.tolist() == expected


def test_it_says_which_groups_have_advantages():
    torch.manual_seed(0)
    rewards = torch.randint(0, 2, (35, 2)).float()
    rewards[torch.rand(35, 2) < 0.1] = NAN
    weights = torch.tensor([0.75, 0.25])
    summed = group_advantages((rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), NAN), 5).values
    assert groups_with_signal(rewards, weights, 5).tolist() == summed.view(7, 5).any(1).tolist()
    single = normalize_then_sum_advantages(rewards[:, :1], weights[:1], 5).values
    assert (
        groups_with_signal(rewards[:, :1], weights[:1], 5, separately=True).tolist()
        == single.view(7, 5).any(1).tolist()
    )


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="num_generations=5 does not divide the 12 rewards"):
        groups_with_signal(REWARDS, torch.ones(2), 5)
