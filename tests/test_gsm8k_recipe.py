"""The GSM8K recipes on the real training questions, with a tiny random model; and their error messages."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_grpo_ext.data.templates import R1_SYSTEM_PROMPT

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TRL_GRPO_EXT_DATA") or ROOT.parent / "shared" / "data")
GSM8K = DATA / "gsm8k" / "train.jsonl.gz"
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def load_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`load_recipe("gsm8k_lora")`: the recipe as `python recipes/...` has it, beside the others."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return import_module


@pytest.fixture
def recipe(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("gsm8k_lora")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of 140,000 weights and a byte-level tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("model")
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=64,  # of NF4's blocks
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,  # the longest question has about 1,000 bytes, the system prompt 450
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def gsm8k_rows() -> list[dict[str, Any]]:
    if not GSM8K.exists():
        pytest.skip("gsm8k/train.jsonl.gz is not there: point TRL_GRPO_EXT_DATA to the folder of real datasets")
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


RECIPES = {
    "gsm8k_lora": [],
    "gsm8k_qlora": ["--rollout-dequantize", "resident"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_trains_on_the_real_questions(
    load_recipe: Callable[[str], ModuleType],
    recipe: ModuleType,
    chat_model: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    rows = gsm8k_rows()
    asked: list[tuple[str, str, str]] = []
    judged: list[float | None] = []
    real_accuracy_reward = recipe.accuracy_reward

    def accuracy_reward(prompts: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
        asked.extend(
            (system["content"], user["content"], gold) for (system, user), gold in zip(prompts, solution, strict=True)
        )
        judged.extend(real_accuracy_reward(prompts=prompts, solution=solution, **kwargs))
        # A random model answers nothing; something has to differ within a group for there to be a gradient.
        return [float(len(ids) + sum(ids) % 7) for ids in kwargs["completion_ids"]]

    monkeypatch.setattr(recipe, "accuracy_reward", accuracy_reward)
    output = tmp_path / "adapter"
    trainer = load_recipe(name).main(
        [*RECIPES[name], "--model", str(chat_model), "--dataset", f"gsm8k:{GSM8K}", "--output-dir", str(output),
         "--max-steps", "3", "--num-generations", "2", "--per-device-train-batch-size", "2",
         "--gradient-accumulation-steps", "2", "--learning-rate", "1e-3", "--beta", "0.1",
         "--max-completion-length", "8", "--lora-r", "4"]
    )  # fmt: skip

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)

    assert len(judged) == 3 * 4
    assert all(value in (0.0, 1.0) for value in judged)  # every gold could be read
    golds = {row["question"]: row["final"] for row in rows}
    assert len(trainer.train_dataset) == len(rows) == 7_473
    assert len(asked) == 3 * 4  # steps, completions per step
    assert len({question for _, question, _ in asked}) == 3 * 2
    for system, question, gold in asked:
        assert system == R1_SYSTEM_PROMPT
        assert golds[question] == gold

    adapter = load_file(output / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # zero before training
    assert str(output) in capsys.readouterr().out

    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    if name == "gsm8k_qlora":
        state = layer.weight.quant_state
        assert (layer.weight.dtype, state.quant_type, state.nested) == (torch.uint8, "nf4", True)
        assert trainer.args.rollout_dequantize == "resident"
    else:
        assert layer.weight.dtype == torch.float32
    fingerprints = trainer.state.stateful_callbacks["BaseFingerprint"]["attributes"]
    assert fingerprints["at_start"] == fingerprints["at_end"] is not None
    lost = [entry["adapter/update_lost"] for entry in trainer.state.log_history if "adapter/update_lost" in entry]
    assert len(lost) == 3 and max(lost) < 0.05


def test_bad_input_is_named(recipe: ModuleType, tmp_path: Path) -> None:
    columns = write_rows(tmp_path / "columns.jsonl", [{"problem": "1 + 1?", "answer": "#### 2"}])
    unmarked = write_rows(
        tmp_path / "unmarked.jsonl", [{"question": "a", "answer": "#### 2"}, {"question": "b", "answer": "two"}]
    )
    for dataset, said in (
        (f"gsm8k:{columns}", "columns.jsonl'.*has no column"),
        (f"gsm8k:{unmarked}", "unmarked.jsonl', row 1: 'answer' must end in '####"),
        ("gsm8k:rows_missing.jsonl", "rows_missing.jsonl"),
    ):
        with pytest.raises(ValueError, match=said):
            recipe.main(["--model", "no/such-model", "--dataset", dataset, "--output-dir", str(tmp_path / "out")])
