import pytest
import torch

from trl_grpo_ext.objective import clip_indicators, clipped_surrogate

# One completion with A = 2 and one with A = -3; six ratios each: below, on, within, on, above the clip (0.8, 1.3)
# and above delta = 2.
RATIO = torch.tensor([[0.5, 0.8, 1.0, 1.3, 1.5, 4.0]] * 2, dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -3.0], dtype=torch.float64)
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.3}


def test_values():
    loss = clipped_surrogate(RATIO, ADVANTAGES, **CLIP)
    expected = [
        # -min(2 r, 2 clip(r)): the gain stops at 1.3
        [-1.0, -1.6, -2.0, -2.6, -2.6, -2.6],
        # -min(-3 r, -3 clip(r)): the relief stops at 0.8, the loss is unbounded above
        [2.4, 2.4, 3.0, 3.9, 4.5, 12.0],
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_delta_bounds_the_loss_of_negative_advantages_only():
    loss = clipped_surrogate(RATIO, ADVANTAGES, **CLIP, delta=2.0)
    expected = clipped_surrogate(RATIO, ADVANTAGES, **CLIP)
    expected[1, 5] = 6.0  # -(-3 * min(4, 2))
    torch.testing.assert_close(loss, expected)


def test_gradients():
    ratio = RATIO.clone().requires_grad_()
    clipped_surrogate(ratio, ADVANTAGES, **CLIP, delta=2.0).sum().backward()
    # -A where the unclipped term is the smaller one, 0 where the clipped one is; on the clip the terms are equal and
    # the gradient still flows.
    expected = [[-2.0, -2.0, -2.0, -2.0, 0.0, 0.0], [0.0, 3.0, 3.0, 3.0, 3.0, 0.0]]
    torch.testing.assert_close(ratio.grad, torch.tensor(expected, dtype=torch.float64))


def test_gradcheck_away_from_the_kinks():
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.5, 4.0]] * 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: clipped_surrogate(r, ADVANTAGES, **CLIP, delta=2.0), (ratio,))


def test_advantage_per_token():
    advantages = torch.tensor([[1.0, -1.0, 0.0]])
    loss = clipped_surrogate(torch.tensor([[1.1, 1.1, 1.1]]), advantages, **CLIP)
    torch.testing.assert_close(loss, torch.tensor([[-1.1, 1.1, 0.0]]))


def test_one_ratio_per_completion():
    loss = clipped_surrogate(torch.tensor([[1.5], [1.5]]), torch.tensor([2.0, -3.0]), **CLIP)
    torch.testing.assert_close(loss, torch.tensor([[-2.6], [4.5]]))


def test_indicators():
    low, high, region = clip_indicators(RATIO, ADVANTAGES, **CLIP)
    # Exactly on the clip is not clipped; each side counts for one sign of the advantage only.
    assert low.tolist() == [[False] * 6, [True, False, False, False, False, False]]
    assert high.tolist() == [[False, False, False, False, True, True], [False] * 6]
    assert torch.equal(region, low | high)


@pytest.mark.parametrize("side", ["low", "high"])
def test_zero_advantage_is_never_clipped(side):
    assert not getattr(clip_indicators(RATIO, torch.zeros(2), **CLIP), side).any()


def test_indicators_see_the_ratio_after_delta():
    # delta = 1.1 bounds every ratio below 1.3, so that nothing counts as clipped high.
    assert not clip_indicators(RATIO, ADVANTAGES, **CLIP, delta=1.1).high.any()
    assert clip_indicators(RATIO, ADVANTAGES, **CLIP, delta=2.0).high.sum() == 2
