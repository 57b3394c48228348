import math

import pytest
import torch

from trl_grpo_ext.objective import importance_ratio

# B=2, C=3; the first completion has two tokens, so its third value must not count.
LOGPS = [[-1.0, -2.0, -9.0], [-0.5, -0.5, -0.5]]
OLD = [[-1.5, -1.0, -1.0], [-0.5, -1.1, -0.2]]
MASK = [[1, 1, 0], [1, 1, 1]]


def test_token_level():
    ratio = importance_ratio(torch.tensor(LOGPS), torch.tensor(OLD), torch.tensor(MASK), "token")
    # log-ratios 0.5, -1 / 0, 0.6, -0.3
    assert ratio.shape == (2, 3)
    torch.testing.assert_close(ratio[0, :2], torch.tensor([0.5, -1.0]).exp())
    torch.testing.assert_close(ratio[1], torch.tensor([0.0, 0.6, -0.3]).exp())


def test_sequence_level_is_the_geometric_mean():
    ratio = importance_ratio(torch.tensor(LOGPS), torch.tensor(OLD), torch.tensor(MASK), "sequence")
    # (0.5 - 1) / 2 = -0.25; (0 + 0.6 - 0.3) / 3 = 0.1
    assert ratio.shape == (2, 1)
    torch.testing.assert_close(ratio, torch.tensor([[math.exp(-0.25)], [math.exp(0.1)]]))


def test_sequence_gradient_is_the_ratio_over_the_length():
    logps = torch.tensor(LOGPS, requires_grad=True)
    importance_ratio(logps, torch.tensor(OLD), torch.tensor(MASK), "sequence").sum().backward()
    # d exp(mean) / d logps_t = exp(mean) / |o|, and 0 off the mask
    first, second = math.exp(-0.25) / 2, math.exp(0.1) / 3
    torch.testing.assert_close(logps.grad, torch.tensor([[first, first, 0.0], [second] * 3]))


def test_an_empty_completion_has_ratio_one():
    ratio = importance_ratio(torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 3), "sequence")
    assert ratio.tolist() == [[1.0]]


def test_unknown_level_is_named():
    with pytest.raises(ValueError, match=r"importance_sampling_level='word'.*'token', 'sequence'"):
        importance_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "word")
