"""Comparing log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from trl_grpo_ext.export.check import TextScores, compare, continue_greedily, score_texts


def test_compare_counts_tokens_of_all_texts() -> None:
    ours = [
        TextScores(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1, 2, 3])),
        TextScores(torch.tensor([-4.0]), torch.tensor([9])),
    ]
    theirs = [
        TextScores(torch.tensor([-1.5, -2.0, -2.0]), torch.tensor([1, 5, 3])),
        TextScores(torch.tensor([-4.1]), torch.tensor([9])),
    ]
    found = compare(ours, theirs)
    assert found.max == 1.0  # |-3 + 2|
    assert found.mean == pytest.approx((0.5 + 0 + 1 + 0.1) / 4)
    assert (found.tokens, found.same_likeliest) == (4, 0.75)


def test_nan_is_refused() -> None:
    good, bad = (TextScores(torch.tensor([value]), torch.tensor([0])) for value in (-1.0, torch.nan))
    with pytest.raises(FloatingPointError, match="NaN"):
        compare([good], [bad])


def test_scores_are_those_of_the_model(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model().eval()
    ids = [70, 90, 110, 80]
    [scores] = score_texts(model, [ids])
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = torch.stack([logps[i, ids[i + 1]] for i in range(3)])
    assert torch.allclose(scores.logps, expected, atol=1e-6)
    assert scores.likeliest.tolist() == logps[:3].argmax(-1).tolist()


def test_continuations_are_greedy(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(seed=3).eval()
    prompts = [[70, 90], [110, 80, 75]]
    assert continue_greedily(model, prompts, 0) == prompts
    for prompt, text in zip(prompts, continue_greedily(model, prompts, 5), strict=True):
        row = list(prompt)
        while len(row) < len(prompt) + 5 and (len(row) == len(prompt) or row[-1] != 2):
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        assert text == row
