"""A run that goes on from a checkpoint ends where the uninterrupted one does, to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from trl_grpo_ext import GRPOTrainer

PER_STEP = ("loss", "grad_norm", "kl", "reward", "num_tokens", "completions/mean_length", "entropy")


def adapter(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def history(trainer: GRPOTrainer, after: int) -> list[dict[str, Any]]:
    """What was logged of each step; the times, which differ, left out."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] > after]
    return [{name: entry[name] for name in ("step", "epoch", *PER_STEP) if name in entry} for entry in entries]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def straight_and_resumed(make_trainer, tmp_path):
    """Train straight on, then again from the checkpoint of `step`; `again` differs between the two trainers."""

    def run(step: int, again: dict[str, Any] | None = None, **given: Any) -> tuple[GRPOTrainer, GRPOTrainer]:
        given = {"optim": "adamw_torch", "learning_rate": 0.02, "save_strategy": "steps", "save_steps": step} | given
        straight = make_trainer(**given)
        straight.train()
        checkpoint = tmp_path / "kept" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", checkpoint)
        resumed = make_trainer(**given | (again or {}))
        torch.manual_seed(99)  # a new process would not have this one's random state either
        resumed.train(resume_from_checkpoint=str(checkpoint))
        return straight, resumed

    return run


# Two prompts a step, twelve of them: an epoch has six steps
CASES = {
    "mid-epoch": (2, {"max_steps": 4, "beta": 0.04}),
    "second epoch": (8, {"max_steps": 10}),
    # A cycle of four steps trains on 8 of 17 prompts twice; two cycles an epoch
    **{
        f"inside a generation, step {step}": (
            step,
            {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": last}
            | {"beta": 0.04},
        )
        for step, last in ((1, 5), (3, 5), (9, 13))
    },
    "between generations": (
        4,
        {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 6},
    ),
    "padded rows": (2, {"max_steps": 3, "attention_packing": "off", "num_iterations": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_ends_like_the_straight_one(straight_and_resumed, case):
    step, fields = CASES[case]
    rows = Dataset.from_dict({"prompt": ["p" * (n % 5 + 1) + str(n) for n in range(12 if "gen" not in case else 17)]})
    straight, resumed = straight_and_resumed(step, train_dataset=rows, **fields)
    assert resumed.state.global_step == straight.state.global_step == fields["max_steps"]
    assert len(history(straight, step)) == fields["max_steps"] - step
    assert history(resumed, step) == history(straight, step)
    assert same(adapter(resumed), adapter(straight))


def test_snapshot_is_the_one_of_the_first_run(straight_and_resumed, make_model, lora):
    """The second run is built on another adapter, as one is that starts from the checkpoint's."""

    def policy(seed: int) -> Any:
        config = lora()
        config.init_lora_weights = False
        torch.manual_seed(seed)
        return get_peft_model(make_model(), config)

    straight, resumed = straight_and_resumed(2, {"model": policy(1)}, model=policy(0), beta=0.5, max_steps=4)
    assert history(resumed, 2) == history(straight, 2)
    assert same(adapter(resumed), adapter(straight))


def test_stream_trains_like_the_dataset_it_is_made_of(make_trainer, rows):
    runs = []
    for data in (rows, rows.to_iterable_dataset()):
        trainer = make_trainer(train_dataset=data, shuffle_dataset=False, max_steps=8, gradient_accumulation_steps=2)
        trainer.train()
        runs.append((adapter(trainer), history(trainer, 0)))
    (mapped, mapped_history), (streamed, streamed_history) = runs
    for entry in (*mapped_history, *streamed_history):
        del entry["epoch"]  # a stream's length is unknown, so its epochs are counted another way
    assert mapped_history == streamed_history
    assert same(mapped, streamed)


def test_shuffled_stream_keeps_groups_whole_and_resumes(straight_and_resumed, rows):
    groups = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        groups.append([prompts[i : i + 3] for i in range(0, len(prompts), 3)])
        return [float(len(ids)) for ids in completion_ids]

    straight, resumed = straight_and_resumed(
        2, reward_funcs=reward, train_dataset=rows.to_iterable_dataset(), max_steps=5, shuffle_dataset=True
    )
    assert all(len(set(group)) == 1 for call in groups for group in call)
    seen = [group[0] for call in groups[:5] for group in call]
    assert len(set(seen)) == len(seen) == 10 and seen != rows["prompt"][:10]
    assert history(resumed, 2) == history(straight, 2)
    assert same(adapter(resumed), adapter(straight))


def test_checkpoint_of_a_finished_generation_holds_no_completions(make_trainer, tmp_path):
    """What is not needed is not kept: prompts may be private, and files add up."""
    make_trainer(num_iterations=2, max_steps=2, save_strategy="steps", save_steps=1).train()
    states = [
        torch.load(Path(tmp_path) / "out" / f"checkpoint-{step}" / "grpo_state_0.pt", weights_only=True)
        for step in (1, 2)
    ]
    assert [state["position"] for state in states] == [1, 0]
    assert states[0]["experience"] is not None and states[1]["experience"] is None
