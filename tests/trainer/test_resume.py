"""A run that goes on from a checkpoint ends where the uninterrupted one does, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

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


@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_dropout_goes_on_with_the_same_random_numbers(straight_and_resumed, make_model, estimator):
    """The policy drops out by the global random state, which is restored after the first step's rollouts are made."""

    def policy() -> dict[str, Any]:
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)
        return {"model": make_model(attention_dropout=0.3), "peft_config": config}

    given = {"beta": 0.5, "kl_estimator": estimator, "max_steps": 4}
    straight, resumed = straight_and_resumed(2, policy(), **policy(), **given)
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


# --- checkpoints that do not fit ---


@pytest.fixture
def save(make_trainer, tmp_path):
    """`save(step, ...)`: train until `step` and return the checkpoint."""

    def run(step: int, **given: Any) -> Path:
        make_trainer(save_strategy="steps", save_steps=step, max_steps=step, **given).train()
        return tmp_path / "out" / f"checkpoint-{step}"

    return run


def resume(make_trainer, checkpoint: Path, **given: Any) -> GRPOTrainer:
    trainer = make_trainer(**given)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def policy(make_model, lora, *, zero: bool) -> Any:
    """An adapter as new, or one that does something already."""
    config = lora()
    config.init_lora_weights = zero
    torch.manual_seed(0)
    return get_peft_model(make_model(), config)


@pytest.mark.parametrize("zero", [True, False])
def test_a_reference_of_another_kind_is_refused(save, make_trainer, make_model, lora, zero):
    checkpoint = save(1, model=policy(make_model, lora, zero=zero), beta=0.04)
    kinds = ["the base model without its adapter", "a snapshot of the trainable parameters"]
    then, now = kinds if zero else reversed(kinds)
    with pytest.raises(ValueError, match=f"is {then} .* is {now} .* Build the trainer from the model"):
        resume(make_trainer, checkpoint, model=policy(make_model, lora, zero=not zero), beta=0.04)


@pytest.mark.parametrize(("first", "second"), [(0.04, 0.0), (0.0, 0.04)])
def test_the_kl_may_be_switched_on_and_off_between_runs(save, make_trainer, first, second):
    trainer = resume(make_trainer, save(1, beta=first), beta=second, max_steps=2)
    assert ("kl" in trainer.state.log_history[-2]) == (second > 0)


# A generation serves 8 micro-steps, 2 a step, and an epoch of 17 prompts has two generations
CYCLES = {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
SEVENTEEN = Dataset.from_dict({"prompt": ["p" * (n % 5 + 1) + str(n) for n in range(17)]})


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        (3, {"steps_per_generation": 2}),
        (3, {"num_iterations": 1}),
        (3, {"per_device_train_batch_size": 3}),  # an index past the completions drawn
        (3, {"num_generations": 6}),
        (3, {"gradient_accumulation_steps": 4}),
        # Half of a generation then: its other half would be taken for a new one
        (2, {"steps_per_generation": 2, "num_iterations": 1}),
        # Between generations then, inside one now: its beginning is missing
        (4, {"steps_per_generation": 6, "per_device_train_batch_size": 3}),
    ],
)
def test_other_settings_inside_a_generation_are_refused(save, make_trainer, step, changed):
    checkpoint = save(step, train_dataset=SEVENTEEN, **CYCLES)
    name, value = next(iter(changed.items()))
    then = ({"per_device_train_batch_size": 6, "num_generations": 3} | CYCLES)[name]
    with pytest.raises(ValueError, match=rf"{name}={then} \(now {value}\).* resume from a checkpoint between two"):
        resume(make_trainer, checkpoint, train_dataset=SEVENTEEN, max_steps=10, **CYCLES | changed)


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        (4, {"steps_per_generation": 2}),
        (4, {"num_iterations": 1}),
        (3, {"num_iterations": 1, "ignore_data_skip": True}),
    ],
)
def test_other_settings_between_generations_go_on(save, make_trainer, step, changed):
    checkpoint = save(step, train_dataset=SEVENTEEN, **CYCLES)
    trainer = resume(make_trainer, checkpoint, train_dataset=SEVENTEEN, max_steps=6, **CYCLES | changed)
    assert trainer.state.global_step == 6
    assert [entry["step"] for entry in history(trainer, step)] == list(range(step + 1, 7))


def test_a_missing_file_is_refused_inside_a_generation(save, make_trainer):
    checkpoint = save(3, train_dataset=SEVENTEEN, **CYCLES)
    (checkpoint / "grpo_state_0.pt").unlink()
    with pytest.raises(ValueError, match=r"grpo_state_0.pt is missing.* at micro-step 6 of the 8"):
        resume(make_trainer, checkpoint, train_dataset=SEVENTEEN, max_steps=5, **CYCLES)
    trainer = resume(make_trainer, checkpoint, train_dataset=SEVENTEEN, max_steps=5, ignore_data_skip=True, **CYCLES)
    assert trainer.state.global_step == 5


def test_a_stream_s_missing_file_is_refused_inside_a_generation(save, make_trainer):
    stream = SEVENTEEN.to_iterable_dataset()
    checkpoint = save(3, train_dataset=stream, **CYCLES)
    (checkpoint / "grpo_state_0.pt").unlink()
    with pytest.raises(ValueError, match=r"grpo_state_0.pt is missing.* at micro-step 6 of the 8"):
        resume(make_trainer, checkpoint, train_dataset=stream, max_steps=5, **CYCLES)


def test_a_missing_file_is_harmless_between_generations(straight_and_resumed, make_trainer, tmp_path):
    """As in a checkpoint of TRL's."""
    given = {"train_dataset": SEVENTEEN, "max_steps": 5, "optim": "adamw_torch", "learning_rate": 0.02, **CYCLES}
    straight, _ = straight_and_resumed(4, **given)
    checkpoint = tmp_path / "kept" / "checkpoint-4"
    (checkpoint / "grpo_state_0.pt").unlink()
    resumed = resume(make_trainer, checkpoint, **given)
    assert history(resumed, 4) == history(straight, 4)
    assert same(adapter(resumed), adapter(straight))


def test_a_generation_of_another_place_in_the_data_is_refused(save, make_trainer):
    checkpoint = save(3, train_dataset=SEVENTEEN, **CYCLES)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"global_step": 2}))
    with pytest.raises(ValueError, match="micro-step 6 of a generation, but the data go on at 4"):
        resume(make_trainer, checkpoint, train_dataset=SEVENTEEN, max_steps=5, **CYCLES)


# --- when and where the file is written ---


def test_the_file_is_there_when_the_checkpoint_is_pushed(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    pushed: list[str] = []
    monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda folder: pushed.extend(os.listdir(folder)))
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    trainer._save_checkpoint(trainer.model, trial=None)
    assert {"grpo_state_0.pt", "trainer_state.json", "adapter_model.safetensors"} <= set(pushed)


def test_a_process_that_saves_no_weights_makes_the_folder(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(max_steps=1, save_only_model=True)
    trainer.train()
    monkeypatch.setattr(trainer, "save_model", lambda *args, **kwargs: None)  # as all but the first process
    trainer._save_checkpoint(trainer.model, trial=None)
    assert (tmp_path / "out" / "checkpoint-1" / "grpo_state_0.pt").is_file()
