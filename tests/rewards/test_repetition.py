"""The repetition penalty, which is TRL's behind checks of its own."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from trl.rewards import get_repetition_penalty_reward

from trl_grpo_ext.rewards.repetition import repetition_reward


def test_by_hand() -> None:
    ids = [
        [1, 2, 3, 4, 5],  # 4 bigrams, 4 different
        [7, 7, 7, 7, 7, 7],  # 5 bigrams, 1 different: (1 - 1/5) * -2
        [1, 2, 1, 2],  # 12 21 12: (1 - 2/3) * -2
        [9],  # too short to have one
        [],
    ]
    values = repetition_reward(ngram_size=2, max_penalty=-2.0)(completion_ids=ids, prompts=None, completions=None)
    assert values == pytest.approx([0.0, -1.6, -2 / 3, 0.0, 0.0])


def test_is_trls_with_trls_defaults() -> None:
    ids = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [1, 1, 1, 1], [2, 3, 4, 2, 3, 4, 2, 3]]
    assert repetition_reward()(completion_ids=ids) == get_repetition_penalty_reward()(completion_ids=ids)


def test_pickled_and_named() -> None:
    reward = pickle.loads(pickle.dumps(repetition_reward(1, -1.0)))
    assert reward(completion_ids=[[4, 4, 4, 5]]) == [-0.5]  # 2 of 4 tokens are different
    assert reward.__name__ == "repetition_penalty_reward"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ngram_size": 0}, ValueError, "`ngram_size` is 0"),
        ({"ngram_size": 2.0}, TypeError, "`ngram_size` must be a whole number, got float"),
        ({"max_penalty": 0.5}, ValueError, "`max_penalty` is 0.5"),
        ({"max_penalty": float("nan")}, ValueError, "`max_penalty` is nan"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        repetition_reward(**options)


def test_a_million_tokens() -> None:
    values = repetition_reward(4)(completion_ids=[[6] * 1_000_000, list(range(1_000_000))])
    assert values == [pytest.approx(-1.0, abs=1e-5), 0.0]
