"""Training with a reference that follows the policy: `sync_ref_model` and `reference_rounds`."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from trl_grpo_ext.policy import AdapterOff, Snapshot
from trl_grpo_ext.syncing import last_sync

SYNC: dict[str, Any] = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trainable(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_kl_is_zero_right_after_a_hard_sync(make_trainer, make_model, full):
    """Synced after steps 2 and 4, so steps 1, 3 and 5 begin with the reference equal to the policy."""
    given = {"model": make_model(), "learning_rate": 1e-3} if full else {}
    trainer = make_trainer(max_steps=5, **SYNC, **given)
    trainer.train()
    kl = logged(trainer, "kl")
    assert [abs(value) <= 1e-6 for value in kl] == [True, False, True, False, True]
    assert logged(trainer, "reference/age") == [1, 0, 1, 0, 1]


def test_kl_is_zero_at_the_start_of_a_round(make_trainer):
    """Six steps in three rounds: they begin with steps 1, 3 and 5."""
    trainer = make_trainer(max_steps=6, beta=0.5, reference_rounds=3)
    assert isinstance(trainer._reference.current, AdapterOff)
    trainer.train()
    assert [abs(value) <= 1e-6 for value in logged(trainer, "kl")] == [True, False] * 3
    assert isinstance(trainer._reference.current, Snapshot)


def test_a_soft_sync_in_training(make_trainer):
    """r = 0.6 * policy + 0.4 * start, of the adapter after two steps; TRL's default alpha."""
    trainer = make_trainer(max_steps=2, **SYNC | {"ref_model_mixup_alpha": 0.6})
    start = trainable(trainer)
    trainer.train()
    for value, first, last in zip(trainer._reference.current.values, start, trainable(trainer), strict=True):
        torch.testing.assert_close(value, 0.4 * first + 0.6 * last)


@pytest.mark.parametrize(
    "fields",
    [SYNC, SYNC | {"ref_model_mixup_alpha": 0.6}, {"beta": 0.5, "reference_rounds": 2}],
    ids=["hard", "soft", "rounds"],
)
@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_has_the_same_reference(make_trainer, tmp_path, fields, step):
    """Resumed before the first sync and after it; a generation serves two steps, so 1 and 3 are inside one."""
    given = {"optim": "adamw_torch", "learning_rate": 0.02, "save_strategy": "steps", "save_steps": step, **fields}
    given |= {"max_steps": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    straight = make_trainer(**given)
    straight.train()
    kept = tmp_path / "kept" / f"checkpoint-{step}"
    shutil.copytree(tmp_path / "out" / kept.name, kept)
    resumed = make_trainer(**given)
    resumed.train(resume_from_checkpoint=str(kept))
    for name in ("kl", "loss", "reference/age"):
        assert logged(resumed, name)[-(4 - step) :] == logged(straight, name)[step:]
    pairs = zip(resumed._reference.current.values, straight._reference.current.values, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(trainable(resumed), trainable(straight), strict=True))


@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_kl_under_autocast_is_to_the_reference(make_trainer, make_model, lora, estimator):
    """Half-precision copies of the policy's weights, which autocast keeps, are not used for the reference."""
    config = lora()
    config.init_lora_weights = False
    torch.manual_seed(5)
    policy = get_peft_model(make_model(), config)
    trainer = make_trainer(model=policy, max_steps=4, bf16=True, kl_estimator=estimator, **SYNC)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[1] > 1e-4 and kl[3] > 1e-4
    if estimator == "full":  # of the same forward pass, so that not even rounding tells them apart
        assert abs(kl[2]) < 1e-6


def test_more_rounds_than_steps_are_refused(make_trainer):
    with pytest.raises(ValueError, match="reference_rounds=4 must be at most 3"):
        make_trainer(max_steps=3, beta=0.1, reference_rounds=4).train()


def test_a_reference_that_has_followed_is_not_forgotten(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2, **SYNC).train()
    with pytest.raises(ValueError, match="had followed the policy"):
        make_trainer(max_steps=3, beta=0.5).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_the_snapshot_is_not_exported(make_trainer, make_model, tmp_path):
    trainer = make_trainer(**SYNC)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(trainable(trainer))
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    assert list(reloaded.peft_config) == ["default"]
    lora = [p for name, p in reloaded.named_parameters() if "lora_" in name]
    assert all(torch.equal(a, b) for a, b in zip(lora, trainable(trainer), strict=True))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sync_ref_model": True, "ref_model_sync_steps": 3}, [0, 0, 3, 3, 3, 6, 6]),
        ({"reference_rounds": 2}, [0, 0, 3, 3, 3, 3, 3]),  # 7 * 1 / 2 = 3
        ({"reference_rounds": 3}, [0, 2, 2, 4, 4, 4, 4]),  # 7 / 3 = 2, 14 / 3 = 4
        ({"reference_rounds": 9}, [1, 2, 3, 4, 5, 6, 6]),  # more rounds than steps: 7 * k / 9 = 0, 1, 2, 3, 3, 4, 5, 6
    ],
)
def test_when_the_reference_is_set(make_trainer, fields, expected):
    args = make_trainer(beta=0.1, **fields).args
    assert [last_sync(args, 7, step) for step in range(1, 8)] == expected
