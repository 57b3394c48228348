"""The reference's log-probs: without dropout, in batches, and of every completion that is charged for its KL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

import trl_grpo_ext.trainer as trainer_module
from trl_grpo_ext import GRPOTrainer
from trl_grpo_ext.evaluating import evaluating
from trl_grpo_ext.policy import AdapterOff, Snapshot

LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5}


@pytest.fixture(params=["fresh adapter", "trained adapter", "full"])
def with_dropout(request, make_model):
    """Model and config fields of a policy with much dropout, and the kind of its reference."""
    model = make_model(attention_dropout=0.5)
    torch.manual_seed(0)
    if request.param == "full":
        return {"model": model, "peft_config": None}, Snapshot
    if request.param == "fresh adapter":
        return {"model": model, "peft_config": LoraConfig(**LORA)}, AdapterOff
    return {"model": get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))}, Snapshot


def logged(trainer: GRPOTrainer, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- dropout ---


@pytest.mark.parametrize("packing", ["on", "off"])
def test_reference_runs_without_dropout(make_trainer, with_dropout, packing):
    """So the KL of completions that were drawn before the first update is 0, and no random number is used up."""
    given, kind = with_dropout
    trainer = make_trainer(beta=0.1, kl_in_reward=True, max_steps=1, attention_packing=packing, **given)
    assert isinstance(trainer._reference, kind)
    reference_logps, random = trainer._maker._reference_logps, []

    def watched(experience: Any) -> torch.Tensor:
        assert trainer.model.training
        random.append(torch.get_rng_state())
        out = reference_logps(experience)
        random.append(torch.get_rng_state())
        assert all(module.training for module in trainer.model.modules())
        return out

    trainer._maker._reference_logps = watched
    trainer.model.train()
    trainer.train()
    experience = trainer._experience
    torch.testing.assert_close(experience.ref_logps, experience.old_logps, rtol=1e-4, atol=1e-5)
    assert logged(trainer, "kl") == pytest.approx([0.0], abs=1e-5)
    assert torch.equal(*random)


def test_exact_kl_runs_its_reference_without_dropout(make_trainer, with_dropout, monkeypatch):
    given, _ = with_dropout
    trainer = make_trainer(beta=0.1, kl_estimator="full", max_steps=1, gradient_checkpointing=False, **given)
    found = []
    compute_loss = trainer.compute_loss

    def checked(model: Any, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        with evaluating(trainer.model):
            scores = trainer._scores(model, inputs["micro_batch"])
        random = torch.get_rng_state()
        found.append(trainer._exact_kl(inputs["micro_batch"], scores))
        assert torch.equal(torch.get_rng_state(), random)
        assert all(module.training for module in trainer.model.modules())
        return compute_loss(model, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", checked)
    trainer.train()
    (kl,) = found
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-6)


# --- micro-batches of the reference ---


def test_padded_reference_takes_a_micro_batch_at_a_time(make_trainer):
    trainer = make_trainer(beta=0.1, attention_packing="off", gradient_accumulation_steps=2, max_steps=1)
    score, sizes = trainer._maker.score, []

    def watched(model: Any, batch: Any) -> Any:
        sizes.append(len(batch.indices))
        return score(model, batch)

    trainer._maker.score = watched
    trainer.train()
    assert sizes == [6, 6]  # 12 completions, per_device_train_batch_size=6


# --- KL in the reward ---


def test_truncated_completions_are_charged_for_their_kl_though_they_are_not_in_the_loss(
    make_trainer, make_model, lora, reward
):
    """Their rewards are in the mean and the standard deviation of their group, so their KL must be too."""
    beta, ends, model = 0.3, set(range(100, 160)), make_model()
    model.generation_config.eos_token_id = sorted(ends)  # many, so that some completions end
    trainer = make_trainer(
        model=model,
        peft_config=lora(),
        beta=beta,
        kl_in_reward=True,
        mask_truncated_completions=True,
        max_completion_length=4,
        learning_rate=0.5,
    )
    trainer.train()

    experience = trainer._experience  # of the second step: drawn after the policy had moved
    truncated = [ids[-1] not in {2, *ends} for ids in experience.completion_ids]
    assert 0 < sum(truncated) < 6
    assert experience.in_loss.tolist() == [not cut for cut in truncated]
    rewards = []
    for b, ids in enumerate(experience.completion_ids):
        log_ratio = experience.old_logps[b, : len(ids)] - experience.ref_logps[b, : len(ids)]
        assert log_ratio.abs().max() > 1e-4
        with torch.no_grad(), evaluating(trainer.model), trainer.model.disable_adapter():
            prompt = experience.prompt_ids[b // 3]
            logits = trainer.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        plain = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(experience.ref_logps[b, : len(ids)], plain, rtol=1e-4, atol=1e-5)
        rewards.append(reward(completion_ids=[ids])[0] - beta * float(log_ratio.sum()))
    groups = torch.tensor(rewards).view(-1, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(experience.advantages, expected.flatten(), rtol=1e-4, atol=1e-4)


# --- a 4-bit base ---


def test_a_4_bit_base_is_packed_and_trained(make_trainer, make_model, tmp_path, lora, monkeypatch):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        model=str(tmp_path / "base"),
        peft_config=lora(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        beta=0.04,
    )
    assert trainer._packed
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    fresh = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    still = {name for name, p in trainer.model.named_parameters() if name in fresh and torch.equal(p, fresh[name])}
    assert still == set()


# --- start-up ---


def test_the_probe_runs_where_training_does(make_trainer, monkeypatch):
    """After the model was moved to its device, and what layers keep is weighed in training's precision."""
    calls: list[str] = []
    move, choose, budget = (
        GRPOTrainer._move_model_to_device,
        trainer_module.choose_packing,
        trainer_module.RecomputeBudget,
    )
    weighed: list[torch.dtype | None] = []

    def moving(self: Any, *args: Any) -> None:
        calls.append("move")
        move(self, *args)

    def choosing(*args: Any) -> bool:
        calls.append("probe")
        return choose(*args)

    class Watched(budget):  # type: ignore[misc, valid-type]
        def _kept(self, *args: Any) -> tuple[int, int]:
            calls.append("weigh")
            with self._autocast():
                weighed.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return super()._kept(*args)

    monkeypatch.setattr(GRPOTrainer, "_move_model_to_device", moving)
    monkeypatch.setattr(trainer_module, "choose_packing", choosing)
    monkeypatch.setattr(trainer_module, "RecomputeBudget", Watched)
    make_trainer(bf16=True)
    assert calls[:2] == ["move", "probe"] and set(calls[2:]) == {"weigh"}
    assert set(weighed) == {torch.bfloat16}


@pytest.mark.parametrize("fields", [{}, {"attention_packing": "off"}])
def test_mixture_of_experts_trains_without_the_load_balancing_loss_only_if_told_to(
    make_trainer, make_model, tmp_path, lora, fields
):
    model = make_model("mixtral", num_local_experts=2)
    assert model.config.router_aux_loss_coef != 0
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.001.*model_init_kwargs"):
        make_trainer(model=model, peft_config=lora())
    model.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        model=str(tmp_path / "base"),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        model_init_kwargs={"router_aux_loss_coef": 0.0},
        train_dataset=Dataset.from_dict({"prompt": ["ab", "question", "x?", "y"]}),
        max_steps=1,
        **fields,
    )
    trainer.train()
    assert trainer.state.global_step == 1
