"""Training on a quantized base, end to end: the base stays, the adapter moves, memory is what it should be."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_grpo_ext import base_fingerprint
from trl_grpo_ext.policy import load_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4 in bf16": NF4 | {"bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8bit": {"load_in_8bit": True},
}
ADAM = {"optim": "adamw_torch", "weight_decay": 0.0}


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    model = make_model("qwen2", hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # which bitsandbytes casts in place
    model.save_pretrained(path)
    return str(path)


def fingerprint_of(folder: str, **quantization: Any) -> str:
    return base_fingerprint(load_model(folder, {"device_map": None}, BitsAndBytesConfig(**quantization)))


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def adapter_of(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dequantize", ["layer", "resident"])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_base_stays_and_the_adapter_moves_at_1e_6(make_trainer, folder, lora, kind, dequantize):
    trainer = make_trainer(
        model=folder,
        quantization_config=BitsAndBytesConfig(**QUANTIZATIONS[kind]),
        peft_config=lora(),
        learning_rate=1e-6,
        max_steps=3,
        beta=0.1,
        rollout_dequantize=dequantize,
        gradient_checkpointing=True,
        **ADAM,
    )
    before = adapter_of(trainer.model)
    assert {p.dtype for p in before} == {torch.float32}
    trainer.train()
    assert base_fingerprint(trainer.model) == fingerprint_of(folder, **QUANTIZATIONS[kind])
    lost = logged(trainer, "adapter/update_lost")
    assert len(lost) == 3
    assert max(lost) < 0.05
    after = adapter_of(trainer.model)
    moved = [float(((a - b).abs() > 0).float().mean()) for a, b in zip(after, before, strict=True)]
    assert sum(moved) / len(moved) > 0.95
    assert all(logps is not None for logps in logged(trainer, "kl"))


def test_the_ways_to_a_quantized_base_are_one(make_trainer, folder, lora):
    """`quantization_config`, `model_init_kwargs` (as an object, or as JSON has it), and a model already loaded."""
    config = {**NF4, "bnb_4bit_compute_dtype": "float32"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**NF4))
    ways: dict[str, dict[str, Any]] = {
        "argument": {"model": folder, "quantization_config": BitsAndBytesConfig(**NF4)},
        "object": {"model": folder, "model_init_kwargs": {"quantization_config": BitsAndBytesConfig(**NF4)}},
        "json": {"model": folder, "model_init_kwargs": json.dumps({"quantization_config": config})},
        "loaded": {"model": loaded},
    }
    results = {}
    for name, way in ways.items():
        trainer = make_trainer(peft_config=lora(), **way)
        trainer.train()
        results[name] = (base_fingerprint(trainer.model), adapter_of(trainer.model))
    expected = results["argument"]
    assert expected[0] == fingerprint_of(folder, **NF4)
    for name, (fingerprint, adapter) in results.items():
        assert fingerprint == expected[0], name
        assert all(torch.equal(a, b) for a, b in zip(adapter, expected[1], strict=True)), name


def test_resident_rollouts_are_the_same(make_trainer, folder, lora):
    """Up to the rounding of products that are taken the other way round."""
    results = []
    for dequantize in ("layer", "resident"):
        trainer = make_trainer(
            model=folder,
            quantization_config=BitsAndBytesConfig(**NF4),
            peft_config=lora(),
            rollout_dequantize=dequantize,
        )
        trainer.train()
        results.append(adapter_of(trainer.model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_adapter_is_saved_and_reproduces_the_policy(make_trainer, folder, lora, tmp_path):
    trainer = make_trainer(model=folder, quantization_config=BitsAndBytesConfig(**NF4), peft_config=lora())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    quantization = BitsAndBytesConfig(**NF4)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").train()  # in evaluation some CPUs compute in bf16
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_stall_is_seen(make_trainer):
    """A bfloat16 adapter, as TRL would have it: forced here, since it is cast up when it is given."""
    trainer = make_trainer(learning_rate=1e-6, max_steps=2, **ADAM)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for module in trainer.model.modules():
        if hasattr(module, "lora_A"):
            vars(module).pop("forward", None)  # PEFT's own, which casts activations
    trainer.train()
    # B starts at 0 and moves in the first step; A has a gradient from the second on, and most of it is lost
    assert logged(trainer, "adapter/update_lost")[1] > 0.3


def test_steps_at_a_learning_rate_of_0_are_left_out(make_trainer):
    trainer = make_trainer(max_steps=3, lr_scheduler_type="linear", warmup_steps=2, learning_rate=0.1)
    trainer.train()
    learning_rates = logged(trainer, "learning_rate")
    assert learning_rates[0] == 0.0 and learning_rates[1] > 0.0
    assert len(logged(trainer, "adapter/update_lost")) == 2


def test_full_fine_tuning_has_neither(make_trainer, make_model):
    trainer = make_trainer(model=make_model(), max_steps=1)
    trainer.train()
    assert not logged(trainer, "adapter/update_lost")
    assert trainer.state.stateful_callbacks["BaseFingerprint"]["attributes"] == {"at_start": None, "at_end": None}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[int, str]]]:
    """`said()`: (level, text) of what `watching.py` logged since the last time."""
    caplog.set_level(logging.INFO, logger="trl_grpo_ext.watching")

    def take() -> list[tuple[int, str]]:
        own = [record for record in caplog.records if record.name == "trl_grpo_ext.watching"]
        caplog.clear()
        return [(record.levelno, record.getMessage()) for record in own]

    return take


def test_the_fingerprint_is_logged_and_kept_in_checkpoints(make_trainer, said, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    expected = base_fingerprint(trainer.model)
    trainer.train()
    for when, (level, text) in zip(("start", "end"), said(), strict=True):
        assert level == logging.INFO
        assert f"at the {when} of training: {expected}" in text
    state = json.loads(Path(tmp_path, "out", "checkpoint-1", "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["BaseFingerprint"]["attributes"] == {"at_start": expected, "at_end": None}
    kept = trainer.state.stateful_callbacks["BaseFingerprint"]["attributes"]
    assert kept == {"at_start": expected, "at_end": expected}


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_on_another_base_is_said(make_trainer, make_model, said, lora, tmp_path, restore):
    make_trainer(save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    options = {"restore_callback_states_from_checkpoint": restore}
    for seed, warns in ((0, False), (1, True)):
        said()
        trainer = make_trainer(model=make_model(seed=seed), peft_config=lora(), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        warnings = [text for level, text in said() if level == logging.WARNING]
        assert ["trained on another base" in text for text in warnings] == [True] * warns


def test_a_base_that_changes_is_said(make_trainer, said):
    trainer = make_trainer()
    base = trainer.model.get_base_model()

    def change(*args: Any, **kwargs: Any) -> None:
        base.model.norm.weight.data += 1

    base.model.layers[0].register_forward_hook(change)
    trainer.train()
    level, text = said()[-1]
    assert level == logging.WARNING
    assert "something changed the frozen weights" in text


def test_biases_that_train_are_no_drift(make_trainer, make_model, said):
    config = LoraConfig(r=3, target_modules="all-linear", bias="all", task_type="CAUSAL_LM")
    make_trainer(model=make_model(), peft_config=config).train()
    assert not said()


# --- memory ---


def test_base_and_adapter_take_less_than_half_of_the_16_bit_base(make_model, tmp_path):
    """Where linear layers dominate, as they do in a model of billions: 4.13 bits of 16, and the adapter's 32.

    A layer of 512 x 512 weights: 131,072 bytes of codes, 4,096 scales of 8 bits, 16 of 32, and 4 bytes of offset, a
    ratio to 524,288 bytes of 0.258; the constant tables of 256 and 16 floats add 0.002.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    make_model("qwen2", **sizes, num_key_value_heads=8).save_pretrained(tmp_path)

    def stored(model: Any) -> int:
        """Bytes of all that is kept between steps: parameters, buffers, quantized state."""
        storages = {}
        for parameter in (*model.parameters(), *model.buffers()):
            state = getattr(parameter, "quant_state", None)
            parts = [parameter]
            while state is not None:
                parts += [part for part in (state.absmax, state.code, state.offset) if part is not None]
                state = state.state2
            for part in parts:
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    half = load_model(str(tmp_path), {"device_map": None, "dtype": "bfloat16"}, None)
    quantized = load_model(str(tmp_path), {"device_map": None, "dtype": "bfloat16"}, BitsAndBytesConfig(**NF4))
    base = stored(half)
    adapted = get_peft_model(quantized, LoraConfig(r=16, target_modules="all-linear"))
    share = stored(adapted) / base
    assert stored(quantized.model.layers) < 0.45 * base
    layer = quantized.model.layers[0].self_attn.o_proj.base_layer
    assert stored(layer) / (2 * 512 * 512) == pytest.approx(0.26, abs=0.01)
    print(f"base + adapter: {share:.3f} of the bf16 base")
    assert share <= 0.45
