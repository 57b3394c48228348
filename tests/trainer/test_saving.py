"""What `save_model` leaves: a plain PEFT adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_grpo_ext import GRPOTrainer

LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
KEYS = {
    f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"
    for layer in range(2)
    for module in LINEAR
    for half in "AB"
}
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",  # which every transformers.Trainer writes
}
IDS = torch.tensor([[70, 90, 110, 80, 75]])


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def saved_base(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_fresh_adapter(make_trainer: Callable[..., GRPOTrainer], saved_base: Path, lora: Any, tmp_path: Path) -> None:
    trainer = make_trainer(model=str(saved_base), peft_config=lora(), beta=0.1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").rglob("*")} == FILES
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert set(tensors) == KEYS
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_base), tmp_path / "saved")
    assert torch.allclose(logits(loaded), logits(trainer.model), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(saved_base)), atol=1e-3)
    assert loaded.peft_config["default"].base_model_name_or_path == str(saved_base)


def test_an_adapter_given_with_a_snapshot_beside_it(
    make_trainer: Callable[..., GRPOTrainer], saved_base: Path, lora: Any, tmp_path: Path
) -> None:
    """beta > 0 with an adapter that does something already keeps a snapshot of it, which is not the user's."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_base), lora())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    trainer = make_trainer(model=model, beta=0.1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").rglob("*")} == FILES
    assert set(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == KEYS
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_base), tmp_path / "saved")
    assert torch.allclose(logits(loaded), logits(trainer.model), atol=1e-5)


def test_other_adapters_of_the_model_stay_out(
    make_trainer: Callable[..., GRPOTrainer], saved_base: Path, lora: Any, tmp_path: Path
) -> None:
    """TRL keeps its reference as a second adapter, `ref`, and a model that it trained may still have it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_base), lora())
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = make_trainer(model=model)
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").rglob("*")} == FILES
    assert set(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == KEYS
