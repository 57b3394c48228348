"""What the end-to-end tests share: prompts, a reward that tells completions apart, and a short way to a trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hub_fixtures import hub, run_script  # noqa: F401 (fixtures)
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trl_grpo_ext import GRPOConfig, GRPOTrainer
from trl_grpo_ext.rewards import in_process

os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Of unequal lengths, so that no padding or position can be right by accident
PROMPTS = "ab question cde? x forty-two hi-you why a-longer-one fghij seven!! 0 mn=opqrstuv".split()

SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "learning_rate": 0.1,
    "optim": "sgd",
    "max_grad_norm": 0.0,  # a clipped gradient would hide a wrong scale
    "seed": 3,
    "per_device_train_batch_size": 6,
    "num_generations": 3,
    "max_completion_length": 7,
    "max_steps": 2,
}


@in_process  # starting workers for every trainer of the suite would cost more than the tests
def token_sum(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that depends on every token and is rarely the same twice."""
    return [sum((i + 1) * token for i, token in enumerate(ids)) % 11 / 3.0 for ids in completion_ids]


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    """Config fields of a short run; both trainers accept them."""
    return dict(SETTINGS)


@pytest.fixture(scope="session")
def reward() -> Callable[..., list[float]]:
    return token_sum


@pytest.fixture(scope="session")
def rows() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


@pytest.fixture(scope="session")
def lora() -> Callable[[], LoraConfig]:
    """A new config each time: PEFT writes the resolved modules into the one it is given."""
    return lambda: LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def make_trainer(
    tmp_path: Path,
    make_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    lora: Callable[[], LoraConfig],
) -> Callable[..., GRPOTrainer]:
    """`make_trainer(reward_funcs=..., train_dataset=..., beta=0.1, ...)`: arguments of the trainer and of its config.

    By default a LoRA adapter on a tiny Qwen2, `token_sum` and the prompts of `rows`.
    """
    arguments = ("model", "reward_funcs", "train_dataset", "processing_class", "peft_config")
    optional = ("eval_dataset", "reward_processing_classes", "callbacks", "optimizers", "quantization_config", "args")

    def make(**given: Any) -> GRPOTrainer:
        inputs = {"reward_funcs": token_sum, "train_dataset": rows, "processing_class": tiny_tokenizer}
        own = {name: given.pop(name) for name in (*arguments, *optional) if name in given}
        if "model" not in own:
            own["model"] = make_model()
            own.setdefault("peft_config", lora())
        if "args" not in own:
            defaults = {"output_dir": str(tmp_path / "out"), "reward_workers": 0}
            own["args"] = GRPOConfig(**defaults | SETTINGS | given)
        return GRPOTrainer(**{**inputs, **own})

    return make
