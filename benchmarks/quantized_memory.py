"""Memory of an NF4 base with its adapter beside that of the same base in bfloat16, measured on the running process.

    python benchmarks/quantized_memory.py [--layers 6] [--hidden 1536] [--vocabulary 24000]

A random checkpoint of Qwen2.5-1.5B's layers, fewer of them, with a vocabulary scaled down as well so that the embeddings
have that model's share of the weights (15 %). Each side is a process of its own: it loads the checkpoint, puts LoRA
(r=16, all linear layers) on it, and takes optimizer steps of `GRPOTrainer`. Reported are the growth of the process's
memory, by the kernel's count on a CPU and PyTorch's on a GPU:

- loaded: once the base is loaded (bfloat16: the base part that the ratio is to);
- with adapter: once the adapter is on it;
- loading peak: the most there was until then, which on a CPU counts the checkpoint's pages, mapped while they are read;
- training peak: the most there was during the steps, with activations, gradients and AdamW's moments.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from memory import MemoryGrowth
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_grpo_ext import GRPOConfig, GRPOTrainer

HERE = Path(__file__).resolve().parent
SIDES = ("bf16", "nf4")


def make_checkpoint(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A random Qwen2 in bfloat16, and a tokenizer of one word per token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 35 // 6,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{i}": i for i in range(vocabulary)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    ).save_pretrained(folder)


def varied(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that differs within a group, so that every step has a gradient."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def measure(side: str, folder: Path, steps: int) -> dict[str, Any]:
    """One side, in this process: bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    torch.zeros(64, 64, device=device) @ torch.zeros(64, 64, device=device)  # what a first product sets up

    def load() -> Any:
        quantization = nf4 if side == "nf4" else None
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": device}
        )

    with MemoryGrowth(device) as loading:
        base = load()
    loaded = loading.now()
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = {"loading_peak": loading.bytes, "loaded": loaded, "with_adapter": loading.now()}
    rows = [{"prompt": " ".join(f"w{10 + (7 * row + i) % 90}" for i in range(40 + row))} for row in range(8)]
    with tempfile.TemporaryDirectory() as output, MemoryGrowth(device) as training:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=varied,
            args=GRPOConfig(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=24,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
    return found | {"training_peak": found["with_adapter"] + training.bytes, "method": loading.method}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--layers", 6), ("--hidden", 1536), ("--vocabulary", 24000), ("--steps", 2)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(measure(arguments.side, arguments.checkpoint, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), arguments.layers, arguments.hidden, arguments.vocabulary)
        found = {}
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--checkpoint", folder, "--steps", str(arguments.steps)]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
            )
            found[side] = json.loads(done.stdout.splitlines()[-1])
    reference = found["bf16"]["loaded"]
    table = Table("", *SIDES, "nf4 / bf16 base", title=f"MiB, {found['bf16']['method']}")
    for row in ("loaded", "with_adapter", "loading_peak", "training_peak"):
        values = [found[side][row] / 2**20 for side in SIDES]
        table.add_row(row.replace("_", " "), *(f"{v:,.0f}" for v in values), f"{found['nf4'][row] / reference:.3f}")
    Console().print(table)
    settings = {name: getattr(arguments, name) for name in ("layers", "hidden", "vocabulary", "steps")}
    arguments.results.mkdir(parents=True, exist_ok=True)
    result = json.dumps({"settings": settings, "bytes": found}, indent=2)
    (arguments.results / "quantized_memory.json").write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
