"""What is logged: TRL's names, and values worked out by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLGRPOTrainer

from trl_grpo_ext import Rollouts
from trl_grpo_ext.metrics import MetricLog

OURS = {
    "time/rollout",
    "time/reward",
    "time/update",
    "tokens/packed",
    "tokens/padded_equivalent",
    "adapter/update_lost",
}


def steps(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_every_name_of_trl_is_logged(
    make_trainer, make_model, tiny_tokenizer, rows, settings, reward, lora, tmp_path, beta
):
    common = {"beta": beta, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    held_out = rows.select([0, 1])
    trl_trainer = TRLGRPOTrainer(
        make_model(),
        reward,
        args=TRLGRPOConfig(output_dir=str(tmp_path / "trl"), **settings | common),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tiny_tokenizer,
        peft_config=lora(),
    )
    trainer = make_trainer(reward_funcs=reward, eval_dataset=held_out, **common)
    trl_trainer.train()
    trainer.train()

    def names(prefix: str, run: Any) -> set[str]:
        return {name for entry in run.state.log_history if f"{prefix}loss" in entry for name in entry}

    assert names("", trl_trainer) - names("", trainer) == set()
    assert names("", trainer) - names("", trl_trainer) == OURS | {
        "frac_completions_skipped",
        "rewards/token_sum/failed",
    }
    evaluated = [{n for e in run.state.log_history if "eval_reward" in e for n in e} for run in (trl_trainer, trainer)]
    # An evaluation here samples and scores. TRL also runs the loss on what it sampled, whose value, advantages times a
    # ratio of 1, says nothing about the policy, and whose cost is another forward pass or two. Tokens are counted where
    # they are trained on, and there are no evaluation steps to count.
    missing = {f"eval_{name}" for name in ("loss", "kl", "entropy", "frac_reward_zero_std", "num_tokens")}
    missing |= {f"eval_clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    assert evaluated[0] - evaluated[1] <= missing | {"eval_steps_per_second"}
    assert evaluated[1] - evaluated[0] == {"eval_rewards/token_sum/failed"}


# Two prompts of 2 and 8 tokens, three completions each; 2 is EOS, and the cap is 7
COMPLETIONS = [[5, 2], [6, 7, 8, 2], [9, 9, 9, 9, 9, 9, 9], [5, 5, 2], [4, 2], [2]]
REWARDS = [1.0, -1.0, 0.0, 2.0, 2.0, 2.0]


class OneProcess:
    """An accelerator of one process."""

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def test_extremes_are_those_since_the_last_log() -> None:
    log = MetricLog()
    for low, high in ((0.25, 0.5), (0.125, 0.25), (0.5, 0.75)):
        log.extreme("low", torch.tensor(low), min)
        log.extreme("high", torch.tensor(high), max)
    assert log.flush(OneProcess()) == {"low": 0.125, "high": 0.75}
    log.extreme("low", torch.tensor(0.375), min)
    assert log.flush(OneProcess()) == {"low": 0.375}


def test_nothing_waits_for_the_device_before_it_is_logged() -> None:
    """A tensor without values, which cannot be asked for one."""
    log, nowhere = MetricLog(), torch.empty((), device="meta")
    log.extreme("low", nowhere, min)
    log.extreme("low", nowhere, min)
    log.accumulate("mean", nowhere, nowhere)
    with pytest.raises(NotImplementedError):
        log.flush(OneProcess())  # only now


@pytest.fixture
def fixed_trainer(make_trainer):
    """Trains on `COMPLETIONS` with `REWARDS`, whatever it would have sampled."""

    def make(**fields: Any) -> Any:
        def given(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return REWARDS

        def odd(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
            return [1.0, None, None, 3.0, None, 2.0]

        def generate(prompt_ids: list[list[int]], num_generations: int, **key: Any) -> Rollouts:
            reasons = ["length" if len(ids) == 7 else "eos" for ids in COMPLETIONS]
            return Rollouts(prompt_ids, COMPLETIONS, torch.zeros(6, 7), reasons, num_generations)

        trainer = make_trainer(
            reward_funcs=[given, odd],
            reward_weights=[1.0, 0.0],
            train_dataset=Dataset.from_dict({"prompt": ["ab", "question"]}),
            shuffle_dataset=False,
            **fields,
        )
        trainer._sampler.generate = generate
        return trainer

    return make


def test_values_of_a_step(fixed_trainer):
    trainer = fixed_trainer(beta=0.0)
    trainer.train()
    first, second = steps(trainer)

    expected = {
        "reward": 1.0,  # (1 - 1 + 0 + 2 + 2 + 2) / 6
        "reward_std": 1.264911,  # sqrt((0 + 4 + 1 + 1 + 1 + 1) / 5) = sqrt(1.6)
        "rewards/given/mean": 1.0,
        "rewards/given/std": 1.264911,
        "rewards/odd/mean": 2.0,  # (1 + 3 + 2) / 3
        "rewards/odd/std": 1.0,  # sqrt((1 + 1 + 0) / 2)
        "frac_reward_zero_std": 0.5,  # the second group's rewards are all 2
        "frac_completions_skipped": 4 / 6,  # that group, and the first's third completion, whose reward is the mean
        "completions/mean_length": 19 / 6,  # 2 + 4 + 7 + 3 + 2 + 1 = 19
        "completions/min_length": 1,
        "completions/max_length": 7,
        "completions/clipped_ratio": 1 / 6,
        "completions/mean_terminated_length": 12 / 5,  # without the 7
        "completions/min_terminated_length": 1,
        "completions/max_terminated_length": 4,
        "num_tokens": 49,  # 3 * 2 + 3 * 8 = 30 of prompts, 19 of completions
        "tokens/packed": 7,  # 2 - 1 of the prompt, 2 + 4 of the two completions that have a gradient
        "tokens/padded_equivalent": 90,  # 6 rows of 8 + 7
        "clip_ratio/region_mean": 0.0,
    }
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, rel=1e-5), name
    # Advantages 1/(1 + 1e-4), -1/(1 + 1e-4) and 0 on 2, 4 and 7 tokens, ratio 1, over all 19 tokens:
    # -(2 - 4) / 19 / 1.0001
    assert first["loss"] == pytest.approx(2 / 19 / 1.0001, rel=1e-3)
    assert second["num_tokens"] == 98
    assert trainer.state.num_input_tokens_seen == 98


@pytest.mark.parametrize("counting", ["all", "non_padding"])
def test_tokens_are_counted_once(fixed_trainer, counting: str) -> None:
    """transformers can count those of its micro-batches, which are these completions again, packed."""
    trainer = fixed_trainer(include_num_input_tokens_seen=counting)
    trainer.train()
    assert [entry["num_tokens"] for entry in steps(trainer)] == [49, 98]  # 3 * 2 + 3 * 8 + 19 a step
    assert trainer.state.num_input_tokens_seen == 98
    assert [entry["num_input_tokens_seen"] for entry in steps(trainer)] == [49, 98]


def test_nothing_is_skipped_with_a_kl_term(fixed_trainer):
    trainer = fixed_trainer(beta=0.04, gradient_accumulation_steps=1)
    trainer.train()
    first = steps(trainer)[0]
    assert first["frac_completions_skipped"] == 0.0
    # 2 - 1 + 13 and 8 - 1 + 6
    assert first["tokens/packed"] == 27
    assert first["kl"] == pytest.approx(0.0, abs=1e-8)


def test_entropy_is_the_mean_over_the_trained_tokens(fixed_trainer):
    trainer = fixed_trainer(beta=0.04, max_steps=1, temperature=0.7)
    with torch.no_grad():
        entropies = []
        for i, completion in enumerate(COMPLETIONS):
            prompt = trainer.processing_class(["ab", "question"][i // 3])["input_ids"]
            logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            logps = (logits / 0.7).log_softmax(-1)
            entropies.append(-(logps.exp() * logps).sum(-1))
    trainer.train()
    assert steps(trainer)[0]["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)


def test_times_add_up(make_trainer):
    def slow(completion_ids, **kwargs):
        time.sleep(0.06)
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(reward_funcs=slow, num_iterations=2, max_steps=2)
    trainer.train()
    first, second = steps(trainer)
    for entry in (first, second):
        parts = [entry[f"time/{name}"] for name in ("rollout", "reward", "update")]
        assert entry["step_time"] == pytest.approx(sum(parts))
        assert entry["time/update"] > 0
    assert first["time/reward"] >= 0.06
    assert first["time/rollout"] > 0
    assert second["time/rollout"] == second["time/reward"] == 0.0  # the second iteration samples nothing


def test_values_between_two_logs_are_averaged(fixed_trainer):
    trainer = fixed_trainer(max_steps=2, logging_steps=2)
    trainer.train()
    (entry,) = steps(trainer)
    assert entry["completions/min_length"] == 1
    assert entry["reward"] == pytest.approx(1.0)
    assert entry["num_tokens"] == 98  # a total, not an average


def test_a_reward_that_says_nothing_leaves_no_nan(make_trainer):
    def silent(completion_ids, **kwargs):
        return [None] * len(completion_ids)

    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(reward_funcs=[silent, length])
    trainer.train()
    entry = steps(trainer)[0]
    assert entry["rewards/silent/mean"] is None
    assert entry["reward"] == entry["completions/mean_length"]


def test_a_nan_loss_is_shown(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    compute_loss = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *a, **k: compute_loss(*a, **k) * float("nan"))
    trainer.train()
    assert all(entry["loss"] != entry["loss"] for entry in steps(trainer))
