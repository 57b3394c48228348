"""Process supervision (arXiv:2402.03300 §4.1.3), with the numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trl_grpo_ext.objective import group_advantages, mix_advantages, process_advantages, stack_steps

NAN = math.nan

# P=1, G=2, C=7. Completion 1 has five tokens and two steps, completion 2 seven tokens and three steps.
REWARDS = [[1.0, 0.0], [1.0, 1.0, 0.0]]
ENDS = [[2, 4], [1, 3, 6]]


def close(actual: torch.Tensor, expected: list[list[float]], atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("correction", "std"),
    [
        # All steps of the group: 1, 0, 1, 1, 0. Mean 3 / 5 = 0.6; squares of deviations 3 * 0.16 + 2 * 0.36 = 1.2
        (1, math.sqrt(1.2 / 4)),  # sample: 0.547723
        (0, math.sqrt(1.2 / 5)),  # population: 0.489898
    ],
)
def test_two_completions_by_hand(correction, std):
    good, bad = 0.4 / std, -0.6 / std  # normalised rewards of a step with 1 and with 0
    advantages = process_advantages(*stack_steps(REWARDS, ENDS), 2, 7, correction=correction, eps=0.0)
    close(
        advantages.values,
        [
            # step 1 ends at token 2, step 2 at token 4: tokens 0 to 2 have both ahead of them, 3 and 4 the second one,
            # and what comes after the last step has none
            [good + bad, good + bad, good + bad, bad, bad, 0, 0],
            # steps end at tokens 1, 3 and 6: three ahead of tokens 0 and 1, two ahead of 2 and 3, one of 4 to 6
            [good + good + bad] * 2 + [good + bad] * 2 + [bad] * 3,
        ],
    )
    close(advantages.std[None], [[std, std]])
    assert advantages.zero_std.tolist() == [False, False]


def test_the_numbers_themselves():
    # With the sample's std: 0.4 / 0.547723 = 0.730297, -0.6 / 0.547723 = -1.095445
    values = process_advantages(*stack_steps(REWARDS, ENDS), 2, 7, eps=0.0).values
    close(
        values,
        [
            [-0.365148, -0.365148, -0.365148, -1.095445, -1.095445, 0.0, 0.0],
            [0.365148, 0.365148, -0.365148, -0.365148, -1.095445, -1.095445, -1.095445],
        ],
    )


def test_eps_and_correction_have_the_defaults_of_group_advantages():
    rewards = torch.tensor([0.0, 2.0, 5.0])
    outcome = group_advantages(rewards, 3)
    # One step per completion, ending at its last token: the process advantage is the outcome advantage, at every token
    process = process_advantages(rewards[:, None], torch.tensor([[1], [0], [3]]), 3, 4)
    for b, length in enumerate((2, 1, 4)):
        assert process.values[b, :length].tolist() == [outcome.values[b].item()] * length
        assert not process.values[b, length:].any()
    assert torch.equal(process.std, outcome.std)


def test_groups_are_normalised_apart():
    # P=2, G=2. The second group is the first, scaled and shifted: the same advantages.
    rewards = [*REWARDS, [13.0, 3.0], [13.0, 13.0, 3.0]]
    values = process_advantages(*stack_steps(rewards, ENDS + ENDS), 2, 7, eps=0.0).values
    torch.testing.assert_close(values[2:], values[:2])


def test_a_step_without_a_reward_moves_nobody():
    # 1, None, 1, 1, 0: mean 3 / 4, squares 3 * 0.0625 + 0.5625 = 0.75, std sqrt(0.75 / 3) = 0.5; 0.5 and -1.5
    values = process_advantages(*stack_steps([[1.0, None], [1.0, 1.0, 0.0]], ENDS), 2, 7, eps=0.0).values
    close(values, [[0.5] * 3 + [0.0] * 4, [-0.5] * 2 + [-1.0] * 2 + [-1.5] * 3])


def test_a_step_in_the_prefill_is_left_out():
    # The first step of completion 2 ends before its first token: as without a reward
    ends = [[2, 4], [-1, 3, 6]]
    values = process_advantages(*stack_steps(REWARDS, ends), 2, 7).values
    without = process_advantages(*stack_steps([[1.0, 0.0], [None, 1.0, 0.0]], ends), 2, 7).values
    assert torch.equal(values, without)
    assert values[1, 0] == values[1, 3]


def test_two_steps_that_end_at_the_same_token_both_count():
    # One completion, steps 0, 3, 0 at tokens 1, 1, 3. Mean 1, squares 1 + 4 + 1 = 6, std sqrt(3): -1, 2, -1 over it
    values = process_advantages(*stack_steps([[0.0, 3.0, 0.0]], [[1, 1, 3]]), 1, 4, eps=0.0).values
    close(values, [[0.0, 0.0, -1 / math.sqrt(3), -1 / math.sqrt(3)]])


@pytest.mark.parametrize("rewards", [[[0.1] * 3, [0.1] * 4], [[0.1, None, None], [None] * 4], [[None] * 3, [None] * 4]])
@pytest.mark.parametrize("correction", [0, 1])
def test_a_group_without_spread_is_exactly_zero(rewards, correction):
    both = stack_steps(rewards + REWARDS, [[0, 2, 4], [1, 3, 5, 6], *ENDS])
    advantages = process_advantages(*both, 2, 7, correction=correction)
    assert not advantages.values[:2].any()
    assert advantages.values[2:].any(dim=1).all()
    assert advantages.std[:2].tolist() == [0.0, 0.0]
    assert advantages.zero_std.tolist() == [True, True, False, False]


def test_the_formula_alone_would_leave_rounding_noise():
    # Guards the test above: with seven steps of 0.1 the zeros are not what the arithmetic gives.
    rewards = torch.full((7,), 0.1)
    assert ((rewards - rewards.nanmean()) / (rewards.std() + 1e-4)).abs().max() > 0


def test_no_steps_no_tokens():
    advantages = process_advantages(*stack_steps([[], []], [[], []]), 2, 3)
    assert advantages.values.tolist() == [[0.0] * 3] * 2
    assert advantages.std.tolist() == [0.0, 0.0]
    # All completions empty: the prompt wrote every step
    assert process_advantages(*stack_steps([[1.0], [0.0]], [[-1], [-1]]), 2, 0).values.shape == (2, 0)


def test_stack_steps_fills_up():
    rewards, ends = stack_steps([[1.0, None, 3.0], [], [0.5]], [[0, 4, 9], [], [2]])
    assert ends.tolist() == [[0, 4, 9], [-1, -1, -1], [2, -1, -1]]
    assert rewards.dtype == torch.float32
    assert ends.dtype == torch.int64
    assert rewards.isnan().tolist() == [[False, True, False], [True] * 3, [False, True, True]]
    assert rewards.nan_to_num(0.0).tolist() == [[1.0, 0.0, 3.0], [0.0] * 3, [0.5, 0.0, 0.0]]


def test_outcome_and_process_are_mixed_by_weight_and_end_with_the_completion():
    outcome = torch.tensor([2.0, -1.0])
    process = torch.tensor([[1.0, 3.0, 0.0], [0.5, 0.5, 4.0]])
    mixed = mix_advantages(outcome, process, torch.tensor([2, 3]), outcome_weight=0.5, process_weight=10.0)
    # 0.5 * 2 + 10 * 1, 0.5 * 2 + 10 * 3, past the end; 0.5 * -1 + 10 * 0.5 twice, 0.5 * -1 + 10 * 4
    assert mixed.tolist() == [[11.0, 31.0, 0.0], [4.5, 4.5, 39.5]]


def test_bad_input_is_named():
    rewards, ends = stack_steps(REWARDS, ENDS)
    with pytest.raises(ValueError, match=r"\[2, 3\] steps per completion and end_tokens \[2, 2\]"):
        stack_steps(REWARDS, [[2, 4], [1, 3]])
    with pytest.raises(ValueError, match=r"step_rewards has shape \(2, 3\) and step_ends \(2, 2\)"):
        process_advantages(rewards, ends[:, :2], 2, 7)
    with pytest.raises(ValueError, match=r"step_ends holds 6, but completions have 6 tokens"):
        process_advantages(rewards, ends, 2, 6)
    with pytest.raises(ValueError, match=r"num_generations=3 does not divide the 2"):
        process_advantages(rewards, ends, 3, 7)
    with pytest.raises(ValueError, match=r"outcome has shape \(3,\)"):
        mix_advantages(torch.zeros(3), torch.zeros(2, 4), torch.ones(2))
