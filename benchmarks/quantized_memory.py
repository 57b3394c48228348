"""Memory of an NF4 base with its adapter beside that of the same base in bfloat16, measured on the running process.

    python benchmarks/quantized_memory.py [--layers 4] [--hidden 1536] [--vocabulary 21700]

A random checkpoint of Qwen2.5-1.5B's layers, fewer of them, with a vocabulary scaled down as well so that embeddings
have that model's share of the weights (15 %). Each side is a process of its own: it loads the checkpoint, puts LoRA
(r=16, all linear layers) on it, and takes optimizer steps of `GRPOTrainer`. Reported are the growth of the process's
memory, by the kernel's count of its own pages on a CPU (Linux) and PyTorch's on a GPU:

- base: once it is loaded, its weights copied out of the checkpoint's pages, which are mapped and not read otherwise;
- with adapter: once the adapter is on it;
- training: the most there was during the steps, with activations, gradients, AdamW's moments, and on a CPU the blocks
  that glibc keeps of what was freed, dequantized layers among them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
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
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1").save_pretrained(folder)


def varied(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that differs within a group, so that every step has a gradient."""
    return [float(sum(ids) % 7) for ids in completion_ids]


class Held:
    """Bytes that this process holds by itself: PyTorch's count on a GPU, anonymous resident pages on a CPU (Linux)."""

    def __init__(self, device: str) -> None:
        self.device, self.most, self._stop = device, 0, threading.Event()

    def now(self) -> int:
        gc.collect()
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        return self._resident()

    def __enter__(self) -> Held:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *nothing: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.device == "cuda":
            self.most = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while self.device != "cuda" and not self._stop.wait(0.005):
            self.most = max(self.most, self._resident())

    def _resident(self) -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024  # in kB


def measure(side: str, folder: Path, steps: int) -> dict[str, int]:
    """One side, in this process: bytes beyond what there was before the base."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    held = Held(device)
    before = held.now()
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=nf4 if side == "nf4" else None,
        device_map={"": device},
    )
    for parameter in base.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.clone()
    found = {"base": held.now() - before}
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    found["with_adapter"] = held.now() - before
    rows = [{"prompt": " ".join(f"w{10 + (7 * row + i) % 90}" for i in range(40 + row))} for row in range(8)]
    with tempfile.TemporaryDirectory() as output, held:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=varied,
            args=GRPOConfig(
                output_dir=output,
                max_steps=steps,
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=16,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        )
        trainer.train()
    return found | {"training": held.most - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--layers", 4), ("--hidden", 1536), ("--vocabulary", 21700), ("--steps", 2)):
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
            command = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--checkpoint",
                folder,
                "--steps",
                str(arguments.steps),
            ]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
            )
            found[side] = json.loads(done.stdout.splitlines()[-1])
    reference = found["bf16"]["base"]
    table = Table("MiB", *SIDES, "nf4 / bf16 base")
    for row in ("base", "with_adapter", "training"):
        values = [found[side][row] / 2**20 for side in SIDES]
        table.add_row(row.replace("_", " "), *(f"{v:,.0f}" for v in values), f"{found['nf4'][row] / reference:.3f}")
    Console().print(table)
    settings = {name: getattr(arguments, name) for name in ("layers", "hidden", "vocabulary", "steps")}
    arguments.results.mkdir(parents=True, exist_ok=True)
    result = json.dumps({"settings": settings, "bytes": found}, indent=2)
    (arguments.results / "quantized_memory.json").write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
