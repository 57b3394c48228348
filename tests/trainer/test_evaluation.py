"""Held-out prompts: sampled, scored, logged as `eval_*`, and good for choosing the best checkpoint."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

TIMES = ("runtime", "samples_per_second", "steps_per_second")


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """So that `eval_reward` has to be `eval_completions/mean_length`."""
    return [float(len(ids)) for ids in completion_ids]


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.calls: list[dict[str, float]] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.calls.append(metrics)


@pytest.fixture(scope="module")
def held_out() -> Dataset:
    """Five prompts: with two at a time, the last batch is not full."""
    return Dataset.from_dict({"prompt": ["ask", "b", "cdefg", "hi there", "zz"], "level": [1, 2, 3, 4, 5]})


def test_evaluation_is_scored_logged_and_repeatable(make_trainer, held_out):
    calls = []

    def recorder(prompts, completion_ids, level, **kwargs):
        calls.append((prompts, completion_ids, level))
        return length(completion_ids)

    callback = Recorder()
    train = Dataset.from_dict({"prompt": ["x", "yy"], "level": [0, 0]})
    trainer = make_trainer(
        reward_funcs=recorder,
        train_dataset=train,
        eval_dataset=held_out,
        per_device_eval_batch_size=6,
        callbacks=[callback],
    )
    trainer.model.train()
    first = trainer.evaluate()
    drawn = [ids for _, completion_ids, _ in calls for ids in completion_ids]
    assert [p for prompts, _, _ in calls for p in prompts] == [p for p in held_out["prompt"] for _ in range(3)]
    assert [n for _, _, level in calls for n in level] == [n for n in held_out["level"] for _ in range(3)]
    assert max(len(prompts) for prompts, _, _ in calls) == 6  # per_device_eval_batch_size
    assert trainer.model.training  # back as it was

    # A mean over all completions, not over batches: the last batch has 3 of the 15
    lengths = [len(ids) for ids in drawn]
    assert first["eval_completions/mean_length"] == pytest.approx(sum(lengths) / 15)
    assert first["eval_completions/min_length"] == min(lengths)
    assert first["eval_completions/max_length"] == max(lengths)
    assert first["eval_reward"] == pytest.approx(sum(lengths) / 15)
    assert first["eval_rewards/recorder/mean"] == pytest.approx(sum(lengths) / 15)
    assert first["eval_reward_std"] == pytest.approx(torch.tensor(lengths).float().std().item(), rel=1e-5)
    assert first["eval_completions/clipped_ratio"] == pytest.approx(sum(ids[-1] != 2 for ids in drawn) / 15)
    assert "eval_runtime" in first

    torch.manual_seed(123)  # evaluation does not hang on the global random state
    assert without_times(trainer.evaluate()) == without_times(first)
    assert without_times(trainer.evaluate(held_out.select([0, 1]))) != without_times(first)
    logged = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert logged[:2] == [first["eval_reward"]] * 2
    assert len(callback.calls) == 3 and callback.calls[0] == first


def test_num_generations_eval(make_trainer, held_out):
    calls = []

    def recorder(prompts, completion_ids, **kwargs):
        calls.append(prompts)
        return length(completion_ids)

    trainer = make_trainer(
        reward_funcs=recorder, eval_dataset=held_out, num_generations_eval=2, per_device_eval_batch_size=4
    )
    trainer.evaluate()
    assert [prompt for prompts in calls for prompt in prompts] == [p for p in held_out["prompt"] for _ in range(2)]


def test_single_completion_per_prompt(make_trainer, held_out):
    """G=1 has no spread to measure, which must not end in NaN or in an error."""
    trainer = make_trainer(
        reward_funcs=length, eval_dataset=held_out.select([0]), num_generations_eval=1, per_device_eval_batch_size=1
    )
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == metrics["eval_completions/mean_length"]
    assert all(value == value for value in metrics.values())


def test_evaluation_while_training_changes_nothing_of_it(make_trainer, held_out):
    adapters, evaluations = [], []
    for fields in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = make_trainer(
            eval_dataset=held_out, max_steps=3, num_iterations=2, per_device_eval_batch_size=6, **fields
        )
        trainer.train()
        adapters.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
        evaluations.append([e["step"] for e in trainer.state.log_history if "eval_reward" in e])
        for entry in trainer.state.log_history:  # an evaluation's values among the training's, or the other way round
            assert len({name.startswith("eval_") for name in entry if name not in ("epoch", "step")}) == 1
    assert evaluations == [[], [0, 1, 2, 3]]
    assert all(torch.equal(a, b) for a, b in zip(*adapters, strict=True))


def test_several_eval_datasets(make_trainer, held_out):
    callback = Recorder()
    trainer = make_trainer(
        reward_funcs=length,
        eval_dataset={"short": held_out.select([1]), "long": held_out.select([2, 3])},
        per_device_eval_batch_size=6,
        callbacks=[callback],
    )
    metrics = trainer.evaluate()
    assert metrics["eval_short_reward"] == metrics["eval_short_completions/mean_length"]
    assert metrics["eval_long_reward"] == metrics["eval_long_completions/mean_length"]
    assert "eval_reward" not in metrics
    assert [("eval_short_reward" in call, "eval_long_reward" in call) for call in callback.calls] == [
        (True, False),
        (False, True),
    ]
    assert without_times(trainer.evaluate("long")) == {
        name: value for name, value in without_times(trainer.evaluate(held_out.select([2, 3]))).items()
    }


def test_stream_of_held_out_prompts(make_trainer, held_out):
    trainer = make_trainer(eval_dataset=held_out, per_device_eval_batch_size=6)
    mapped = trainer.evaluate()
    assert without_times(trainer.evaluate(held_out.to_iterable_dataset())) == without_times(mapped)


def test_evaluate_without_data_says_what_to_do(make_trainer):
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer().evaluate()


def test_best_checkpoint_by_eval_reward(make_trainer, held_out, tmp_path):
    def token_mean(completion_ids, **kwargs):
        return [sum(ids) / len(ids) for ids in completion_ids]

    trainer = make_trainer(
        reward_funcs=token_mean,
        eval_dataset=held_out,
        per_device_eval_batch_size=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        learning_rate=5.0,
        metric_for_best_model="eval_reward",
        load_best_model_at_end=True,
    )
    trainer.train()
    rewards = {e["step"]: e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e}
    assert len(rewards) == 4 and len(set(rewards.values())) > 1
    best = max(rewards, key=lambda step: (rewards[step], -step))
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert get_last_checkpoint(str(tmp_path / "out")).endswith("checkpoint-4")
    card = tmp_path / "out" / "README.md"
    trainer.create_model_card()
    assert f"The weights are those of step {best}, the best of the run." in card.read_text()
    assert f"| reward | {rewards[best]:.4g} |" in card.read_text()  # not what the last step had
    trainer.is_in_train = True  # as it is while it trains on
    trainer.create_model_card()
    assert "the best of the run" not in card.read_text() and f"| reward | {rewards[4]:.4g} |" in card.read_text()
    trainer.is_in_train = False
    assert trainer.evaluate()["eval_reward"] == pytest.approx(rewards[best])  # its adapter is the one loaded


def even_sum(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def test_pass_at_k_of_each_prompt(make_trainer, held_out):
    """Against all subsets of each prompt's completions; of prompts that a reward is silent on, none."""
    seen = []

    def rare(completion_ids, level, **kwargs):
        values = [None if n == 5 else float(sum(ids) % 3 == 0) for ids, n in zip(completion_ids, level, strict=True)]
        seen.extend(values)
        return values

    trainer = make_trainer(
        reward_funcs=[length, rare],
        train_dataset=held_out,
        eval_dataset={"five": held_out, "silent": held_out.select([4])},
        num_generations_eval=4,
        per_device_eval_batch_size=8,
        eval_pass_at_k=[1, 3],
        eval_pass_at_k_reward="rare",
    )
    metrics = trainer.evaluate()
    groups = [seen[start : start + 4] for start in range(0, 16, 4)]
    assert seen[16:20] == [None] * 4 and 0 < sum(map(sum, groups)) < 16
    for k in (1, 3):
        shares = []
        for group in groups:
            subsets = list(combinations(group, k))
            shares.append(sum(any(subset) for subset in subsets) / len(subsets))
        assert metrics[f"eval_five_pass@{k}"] == pytest.approx(sum(shares) / 4)
    assert not any(name.startswith("eval_silent_pass@") for name in metrics)
    assert "eval_five_pass@2" not in metrics


def test_which_reward_says_what_is_right(make_trainer, held_out):
    def accuracy_reward(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    fields = {"train_dataset": held_out, "eval_dataset": held_out, "per_device_eval_batch_size": 6}
    rewards = [even_sum, accuracy_reward]
    assert make_trainer(reward_funcs=rewards, eval_pass_at_k=[1], **fields).evaluate()["eval_pass@1"] == 1
    first = make_trainer(reward_funcs=[even_sum, length], eval_pass_at_k=[1], **fields).evaluate()
    assert 0 < first["eval_pass@1"] < 1
    assert first["eval_pass@1"] == pytest.approx(first["eval_rewards/even_sum/mean"])
    with pytest.raises(ValueError, match=r"eval_pass_at_k_reward='lenght' is none of .*'even_sum', 'length'"):
        make_trainer(reward_funcs=[even_sum, length], eval_pass_at_k=[1], eval_pass_at_k_reward="lenght", **fields)


def test_best_checkpoint_by_pass_at_k(make_trainer, held_out):
    trainer = make_trainer(
        reward_funcs=even_sum,
        eval_dataset=held_out,
        per_device_eval_batch_size=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        learning_rate=5.0,
        eval_pass_at_k=[2],
        metric_for_best_model="pass@2",
        load_best_model_at_end=True,
    )
    trainer.train()
    passes = {e["step"]: e["eval_pass@2"] for e in trainer.state.log_history if "eval_pass@2" in e}
    assert len(passes) == 4 and len(set(passes.values())) > 1
    best = max(passes, key=lambda step: (passes[step], -step))
    assert best != 4  # else the last adapter would do as well
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_pass@2"] == pytest.approx(passes[best])  # its adapter is the one loaded
