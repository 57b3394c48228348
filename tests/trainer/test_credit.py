"""Process supervision and the advantage estimators, from rollouts to the loss."""

from __future__ import annotations

import math

import pytest
import torch

from trl_grpo_ext.rewards import StepRewards, step_reward


def halves(completion_ids, completions, **kwargs):
    """Two steps: the first half of the text, worth the number of tokens modulo 3, and the rest, worth the first id."""
    rewards = []
    for ids, text in zip(completion_ids, completions, strict=True):
        if len(text) < 2:
            rewards.append(None)
        else:
            rewards.append(StepRewards([len(ids) % 3, ids[0] % 5], [len(text) // 2, len(text)]))
    return rewards


def worth(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def experience_of(trainer):
    """What one generation of the trainer's first two prompts is trained on, and its log."""
    rows = [{"prompt": p} for p in ("ab", "question") for _ in range(3)]
    metrics = trainer._metrics
    made = trainer._maker.make(rows, trainer.state, 0, metrics, trainer._clock)
    return made, metrics.flush(trainer.accelerator)


def test_tokens_get_the_normalised_rewards_of_their_steps_and_of_those_after(make_trainer, tiny_tokenizer):
    """By the formula of DeepSeekMath §4.1.3, step by step; every token of this tokenizer is one character."""
    trainer = make_trainer(reward_funcs=step_reward(halves))
    made, logs = experience_of(trainer)
    assert made.advantages.shape == (6, max(map(len, made.completion_ids)))
    steps = 0
    for group in range(2):
        ids = made.completion_ids[3 * group : 3 * group + 3]
        texts = tiny_tokenizer.batch_decode(ids, skip_special_tokens=True)
        judged = halves(ids, texts)
        pool = [reward for one in judged if one is not None for reward in one.rewards]
        steps += len(pool)
        mean = sum(pool) / len(pool)
        std = math.sqrt(sum((r - mean) ** 2 for r in pool) / (len(pool) - 1))
        for i, (one, tokens) in enumerate(zip(judged, ids, strict=True)):
            row = made.advantages[3 * group + i].tolist()
            if one is None:
                assert row == [0.0] * len(row)
                continue
            first, second = ((r - mean) / (std + 1e-4) for r in one.rewards)
            expected = [first + second if t < one.ends[0] else second for t in range(len(tokens))]
            assert row[: len(tokens)] == pytest.approx(expected, abs=1e-5)
            assert row[len(tokens) :] == [0.0] * (len(row) - len(tokens))
    assert logs["process/steps_mean"] == pytest.approx(steps / 6)
    assert logs["process/steps_judged"] == 1.0


def test_step_rewards_train_and_mix_with_outcome_rewards(make_trainer):
    alone = make_trainer(reward_funcs=worth)
    mixed = make_trainer(reward_funcs=[worth, step_reward(halves)], reward_weights=[2.0, 0.5])
    steps = make_trainer(reward_funcs=step_reward(halves))
    outcome, _ = experience_of(alone)
    process, _ = experience_of(steps)
    both, _ = experience_of(mixed)
    lengths = torch.tensor([len(ids) for ids in both.completion_ids])
    inside = torch.arange(both.advantages.shape[1]) < lengths[:, None]
    # The weight of an outcome reward scales the reward, which the division by the group's std takes out again
    expected = torch.where(inside, outcome.advantages[:, None] + 0.5 * process.advantages, 0.0)
    torch.testing.assert_close(both.advantages, expected, rtol=1e-3, atol=1e-3)
    mixed.train()
    assert all(math.isfinite(entry["loss"]) for entry in mixed.state.log_history if "loss" in entry)
    assert any(entry["grad_norm"] > 0 for entry in mixed.state.log_history if "grad_norm" in entry)


def test_padded_rows_see_the_same_advantages(make_trainer):
    """Packed and padded updates agree with an advantage per token as they do with one per completion."""
    runs = []
    for packing in ("on", "off"):
        trainer = make_trainer(reward_funcs=step_reward(halves), attention_packing=packing)
        trainer.train()
        runs.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-4, atol=1e-6)


def test_a_step_reward_that_returns_numbers_fails(make_trainer):
    from trl_grpo_ext import RewardError

    trainer = make_trainer(reward_funcs=step_reward(lambda completions, **kwargs: [1.0] * len(completions)))
    with pytest.raises(RewardError, match="neither a finite StepRewards nor None"):
        trainer.train()


@pytest.mark.parametrize("estimator", ["rloo", "remax", "raft", "reinforce"])
def test_estimators_reach_the_loss(make_trainer, estimator):
    trainer = make_trainer(reward_funcs=worth, advantage_estimator=estimator)
    made, _ = experience_of(trainer)
    rewards = torch.tensor(worth(made.completion_ids)).view(2, 3)
    if estimator == "rloo":
        expected = rewards - (rewards.sum(1, keepdim=True) - rewards) / 2
    elif estimator == "raft":
        best = (rewards == rewards.amax(1, keepdim=True)).float()
        expected = best * (best.cumsum(1) == 1) * (rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True))
    elif estimator == "reinforce":
        expected = rewards - rewards.mean()
    else:
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in ("ab", "question")]
        greedy = trainer._sampler.generate(ids, 1, greedy=True).completion_ids
        expected = rewards - torch.tensor(worth(greedy))[:, None]
    torch.testing.assert_close(made.advantages.view(2, 3), expected)
    trainer.train()
    assert trainer.state.global_step == 2


def test_kl_is_no_reward_for_a_completion_whose_outcome_failed(make_trainer):
    """Its step rewards do not make up for that: as NaN it is outside its group's mean."""
    trainer = make_trainer(reward_funcs=[worth, step_reward(halves)], beta=0.1, kl_in_reward=True)
    made, _ = experience_of(trainer)
    rewards = torch.ones(6, 2)
    rewards[4, 0] = torch.nan
    rewards[5, 1] = torch.nan
    penalty = trainer._maker._kl_penalty(made, rewards, trainer._metrics)
    assert penalty.isnan().flatten().tolist() == [False] * 4 + [True, False]
