"""A tiny base and adapter to push."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_fixtures import hub, run_script  # noqa: F401 (fixtures)
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def base_folder(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A tiny model and its tokenizer on disk."""
    folder = tmp_path / "tiny-base"
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_folder(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """What PEFT's `save_pretrained` writes, and things that lie in a run's folder and are none of the Hub's."""
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "adapter_model.safetensors").write_bytes(b"older")
    return folder
