"""`training_config.yaml`: what it holds, what it leaves out, and that config and adapter come back from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_server import TOKEN
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trl_grpo_ext import GRPOConfig
from trl_grpo_ext.hub import load_run_config, run_adapter, run_arguments, run_quantization
from trl_grpo_ext.hub.card import model_card
from trl_grpo_ext.hub.datasets import dataset_id, describe_dataset
from trl_grpo_ext.hub.run_config import run_config, save_run_config

REWARDS = {"accuracy_reward": 1.0, "short": 0.25}


def arguments(tmp_path: Path, **given: object) -> GRPOConfig:
    return GRPOConfig(**{"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, **given})


def test_round_trip(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    args = arguments(
        tmp_path,
        learning_rate=3e-5,
        num_generations=3,
        per_device_train_batch_size=6,
        generation_batch_size=12,
        generation_kwargs={"top_k": 7},
        scale_rewards=False,
        lr_scheduler_type="cosine",
        reward_weights=[1.0, 0.25],
        logging_steps=0.1,
    )
    lora = LoraConfig(r=3, target_modules={"v_proj", "q_proj"}, use_rslora=True, task_type="CAUSAL_LM")
    record = run_config(args, make_model(), peft_config=lora, rewards=REWARDS)
    loaded = load_run_config(save_run_config(record, tmp_path))
    assert loaded == record
    assert loaded["adapter"] == {
        "peft_type": "LORA",
        "r": 3,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "task_type": "CAUSAL_LM",
    }
    assert loaded["rewards"] == [{"name": "accuracy_reward", "weight": 1.0}, {"name": "short", "weight": 0.25}]
    assert loaded["training"] == {
        "per_device_train_batch_size": 6,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "cosine",
        "seed": 42,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,  # use_cpu turns it off
        "logging_steps": 0.1,
        "num_generations": 3,
        "steps_per_generation": 2,
        "generation_kwargs": {"top_k": 7},
        "reward_weights": [1.0, 0.25],
        "scale_rewards": "none",
    }
    again = run_arguments(loaded, output_dir=str(tmp_path / "out"))
    assert again.to_dict() == args.to_dict()
    adapter = run_adapter(loaded)
    assert adapter is not None
    assert adapter.to_dict() == lora.to_dict()


def test_places_and_tokens_are_left_out(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    model.config._name_or_path = str(tmp_path / "private" / "base")
    (tmp_path / "private" / "base").mkdir(parents=True)
    args = arguments(
        tmp_path,
        hub_token=TOKEN,
        hub_model_id="ada/run",
        run_name="at home",
        model_init_kwargs={"token": TOKEN, "revision": "v2", "dtype": torch.bfloat16},
    )
    rewards = {f"reward of {TOKEN}": 1.0, "b": 1.0}
    record = run_config(args, model, peft_config=None, rewards=rewards)
    text = save_run_config(record, tmp_path).read_text()
    assert TOKEN not in text
    assert str(tmp_path) not in text
    assert "ada/run" not in text
    assert "at home" not in text
    assert record["model"]["folder"] == "base"
    assert record["model"]["revision"] == "v2"
    assert record["adapter"] is None
    assert run_adapter(record) is None
    assert record["training"]["model_init_kwargs"] == {"revision": "v2", "dtype": "bfloat16"}


def test_quantization_is_written_as_settings(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    args = arguments(tmp_path, model_init_kwargs={"quantization_config": four_bit})
    record = load_run_config(
        save_run_config(run_config(args, make_model(), peft_config=None, rewards=REWARDS), tmp_path)
    )
    written = record["training"]["model_init_kwargs"]["quantization_config"]
    assert BitsAndBytesConfig.from_dict(written).to_dict() == four_bit.to_dict()


def test_a_quantized_base_is_written_and_made_again(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit, dtype=torch.bfloat16)
    record = load_run_config(
        save_run_config(run_config(arguments(tmp_path), model, peft_config=LoraConfig(), rewards=REWARDS), tmp_path)
    )
    assert record["model"]["dtype"] == "bfloat16"
    again = run_quantization(record)
    assert again is not None
    assert again.to_dict() == four_bit.to_dict()
    assert "`nf4`" in model_card(record, repo_id="ada/run", model_name="run").text
    plain = run_config(arguments(tmp_path), make_model(), peft_config=None, rewards=REWARDS)
    assert run_quantization(plain) is None
    args = arguments(tmp_path, model_init_kwargs={"quantization_config": four_bit})
    assert run_quantization(run_config(args, model, peft_config=None, rewards=REWARDS)) is None  # the config says it


def test_an_adapter_that_there_was_is_named_without_its_folder(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    for given, written in ((str(tmp_path / "first"), "first"), ("ada/first", "ada/first")):
        args = arguments(tmp_path, adapter_name_or_path=given)
        record = run_config(args, make_model(), peft_config=LoraConfig(), rewards=REWARDS)
        assert record["training"]["adapter_name_or_path"] == written
        assert str(tmp_path) not in str(record)
        assert run_adapter(record) is None  # the field brings it


def test_datasets(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "solution": ["1", "2", "3"]})
    described = describe_dataset(rows)
    assert described["rows"] == 3
    assert described["columns"] == ["prompt", "solution"]
    assert described["fingerprint"] == rows._fingerprint
    assert "id" not in described
    rows.info.download_checksums = {"hf://datasets/openai/gsm8k@e53f048/main/train-00000-of-00001.parquet": {}}
    rows.info.config_name = "main"
    described = describe_dataset(rows)
    assert (described["id"], described["revision"], described["config"]) == ("openai/gsm8k", "e53f048", "main")
    assert dataset_id(rows) == "openai/gsm8k"
    stream = describe_dataset(rows.to_iterable_dataset())
    assert "rows" not in stream
    assert dataset_id(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\n", "has no sections 'model' and 'training'"),
        ("model: x\ntraining: {}\n", "has no sections 'model' and 'training'"),
        ("a: [1\n", "training_config.yaml is not YAML"),
    ],
)
def test_no_run_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "training_config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run_config(tmp_path / "training_config.yaml")
