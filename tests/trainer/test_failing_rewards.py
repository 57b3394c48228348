"""A run whose reward raises, hangs, returns NaN, None or a wrong count now and then trains to the end, and exactly."""

from __future__ import annotations

import collections
import json

import failing_rewards
import pytest
import torch


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("function", [failing_rewards.unreliable, failing_rewards.unreliable_row_wise])
def test_failed_completions_are_as_if_the_reward_had_said_none(make_trainer, function, tmp_path):
    """The whole runs are equal, and so is every gradient; rewards of None are outside baseline and gradient."""
    runs = {}
    for name, reward in (("failing", function), ("silent", failing_rewards.silent)):
        trainer = make_trainer(
            reward_funcs=reward,
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=12,
            max_steps=4,
            reward_timeout=1.0,
            reward_workers=2,
            reward_max_failure_rate=1.0,
        )
        start = adapter(trainer)
        trainer.train()
        runs[name] = (adapter(trainer), [e for e in trainer.state.log_history if "loss" in e])
        trainer._maker.reward_scorer.close()
    (failing, failing_logs), (silent, silent_logs) = runs["failing"], runs["silent"]
    assert any((failing[name] != start[name]).any() for name in start)
    for name in start:
        torch.testing.assert_close(failing[name], silent[name], rtol=0, atol=0)
    kinds = collections.Counter(
        json.loads(line)["kind"] for line in (tmp_path / "failing" / "reward_failures.jsonl").read_text().splitlines()
    )
    # Every kind of failure occurred; None is no failure
    assert set(kinds) == {"raised", "timeout", "value", "count"}, kinds
    failed = f"rewards/{function.__name__}/failed"
    assert sum(entry[failed] for entry in failing_logs) == sum(kinds.values())
    assert all(entry["rewards/silent/failed"] == 0 for entry in silent_logs)
    for mine, other in zip(failing_logs, silent_logs, strict=True):
        assert mine["reward"] == other["reward"]
        assert mine["grad_norm"] == other["grad_norm"]
