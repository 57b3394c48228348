"""`training_config.yaml` as options of `trl-grpo train`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedModel

from trl_grpo_ext import GRPOConfig
from trl_grpo_ext.cli.prompt_options import TrainPrompts
from trl_grpo_ext.cli.recorded_run import options_of_record, recipe_of
from trl_grpo_ext.cli.train import make_parser
from trl_grpo_ext.cli.train_inputs import peft_config_of, quantization_of, reward_specs, with_init_kwargs
from trl_grpo_ext.cli.train_options import TrainModel, TrainRewards
from trl_grpo_ext.hub.run_config import run_config, save_run_config


def rows_of_the_hub() -> Dataset:
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"]}, split="train")
    rows.info.download_checksums = {"hf://datasets/openai/gsm8k@e53f048/main/train-00000-of-00001.parquet": {}}
    rows.info.config_name = "main"
    return rows


def test_a_run_made_in_python(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    model.config._name_or_path = "Qwen/Qwen2.5-0.5B-Instruct"
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        learning_rate=3e-5,
        num_generations=3,
        per_device_train_batch_size=6,
        generation_kwargs={"top_k": 7},
        model_init_kwargs={"revision": "v2"},
        reward_weights=[1.0, 0.25],
        lr_scheduler_type="cosine",
    )
    lora = LoraConfig(r=3, target_modules={"v_proj", "q_proj"}, use_rslora=True, task_type="CAUSAL_LM")
    rewards = {"accuracy_reward": 1.0, "think_answer_format_reward": 0.25}
    record = run_config(args, model, peft_config=lora, rewards=rewards, train_dataset=rows_of_the_hub())
    file = save_run_config(record, tmp_path)
    who, adapter, prompts, specs, _, again = make_parser().read(
        ["--config", str(file), "--output-dir", str(tmp_path), "--seed", "5"]
    )
    assert (who.model, who.revision, who.quantize) == ("Qwen/Qwen2.5-0.5B-Instruct", None, None)
    found = peft_config_of(adapter, has_adapter=False)
    assert found is not None and found.to_dict() == lora.to_dict()
    assert (prompts.dataset, prompts.dataset_config, prompts.dataset_split) == ("openai/gsm8k", "main", "train")
    assert reward_specs(specs) == [
        {"name": "accuracy", "weight": 1.0},
        {"name": "think_answer_format", "weight": 0.25},
    ]
    assert again.seed == 5  # the command line's
    expected = args.to_dict() | {"seed": 5, "reward_weights": None}  # they are with the rewards
    assert again.to_dict() == expected


def test_a_quantized_base_and_every_weight(tmp_path: Path) -> None:
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    settings = {
        name: value for name, value in four_bit.to_dict().items() if not name.startswith("_")
    }  # as it is written
    record = {
        "model": {"folder": "base", "dtype": "bfloat16", "quantization": settings},
        "training": {"use_cpu": True, "bf16": False},
        "adapter": {"peft_type": "LORA", "r": 3},
        "datasets": {"train": {"id": "openai/gsm8k"}},
        "rewards": [],
    }
    options = options_of_record(record)
    assert (options["model"], options["dtype"]) == ("base", "bfloat16")
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    who = TrainModel(quantize=options["quantize"], dtype=options["dtype"])
    quantization = quantization_of(who, args)
    assert quantization is not None and quantization.to_dict() == four_bit.to_dict()
    with_init_kwargs(who, args)
    assert args.model_init_kwargs == {"dtype": "bfloat16"}
    assert options_of_record({**record, "adapter": None})["adapter"] == "none"
    going_on = {**record, "training": {"adapter_name_or_path": "ada/first"}}
    assert "adapter" not in options_of_record(going_on)


def test_what_a_record_cannot_tell_is_said(caplog: pytest.LogCaptureFixture) -> None:
    record = {
        "model": {"id": "a/b"},
        "training": {},
        "datasets": {"train": {"rows": 3}},
        "rewards": [{"name": "my_own", "weight": 1.0}],
    }
    with caplog.at_level(logging.WARNING):
        options = options_of_record(record)
    assert "dataset" not in options and "rewards" not in options
    assert "does not say which dataset" in caplog.text
    assert "(my_own): pass --rewards" in caplog.text


def test_other_files_are_left_as_they_are() -> None:
    options = {"model": "a/b", "learning_rate": 1e-5}
    assert options_of_record(options) == options


def test_a_recipe_holds_no_place(tmp_path: Path) -> None:
    rewards = TrainRewards(rewards=[{"name": f"{tmp_path}/judge.py:one", "weight": 0.5}, "accuracy"])
    prompts = TrainPrompts(dataset={str(tmp_path / "rows.jsonl"): 1.0}, few_shot="~/shots.jsonl", template="a/b.jinja")
    prompts.eval_dataset = [f"gsm8k:{tmp_path}/test.jsonl", "openai/gsm8k", "procedural:countdown"]
    assert recipe_of([TrainModel(model=str(tmp_path / "base")), prompts, rewards]) == {
        "model": "base",
        "dataset": {"rows.jsonl": 1.0},
        "few_shot": "shots.jsonl",
        "eval_dataset": ["gsm8k:test.jsonl", "openai/gsm8k", "procedural:countdown"],
        "template": "a/b.jinja",  # relative: of the project, not of the machine
        "rewards": [{"name": "judge.py:one", "weight": 0.5}, "accuracy"],
    }


def test_a_recipe_wins_over_what_the_trainer_was_given() -> None:
    record = {
        "model": {"id": "a/b", "dtype": "float32"},
        "training": {"learning_rate": 1e-5, "reward_weights": [2.0], "model_init_kwargs": {"dtype": "bfloat16"}},
        "rewards": [{"name": "accuracy_reward", "weight": 2.0}],
        "recipe": {"model": "c/d", "dtype": "bfloat16", "rewards": ["accuracy:2"]},
    }
    assert options_of_record(record) == {
        "learning_rate": 1e-5,
        "model_init_kwargs": {},
        "model": "c/d",
        "dtype": "bfloat16",
        "rewards": ["accuracy:2"],
    }
