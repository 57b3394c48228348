"""Rollouts on a quantized base against those of a LoRA policy on the same base in 16 or 32 bits.

    python benchmarks/quantized_rollouts.py [--layers 6] [--hidden 1024] [--rows 32] [--tokens 48]

One random Qwen2 with LoRA (r=16) on all linear layers, completions of a fixed number of tokens; the first run of each
is thrown away, the best of three is reported. On a CPU seconds are those of the processor, on a GPU those of the clock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_grpo_ext import GroupSampler

VOCABULARY = 8000


def nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def seconds(
    folder: str, dtype: torch.dtype, quantization: Any, dequantize: str, arguments: argparse.Namespace
) -> float:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    if torch.cuda.is_available():
        model = model.to("cuda") if quantization is None else model
    words = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), pad_token="<0>", eos_token="<1>"
    )
    sampler = GroupSampler(model, tokenizer, dequantize=dequantize)
    prompts = [list(range(2, 2 + 100 + i)) for i in range(arguments.rows // 8)]
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = []
    for _ in range(4):
        started = clock()
        sampler.generate(prompts, 8, max_new_tokens=arguments.tokens, suppress_tokens=[1])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - started)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--layers", 6), ("--hidden", 1024), ("--rows", 32), ("--tokens", 48)):
        parser.add_argument(name, type=int, default=default)
    arguments = parser.parse_args()
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 256),
        eos_token_id=1,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).save_pretrained(folder)
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype)[6:]
            plain = seconds(folder, dtype, None, "layer", arguments)
            print(f"{name:9s} LoRA           {plain:6.2f} s", flush=True)
            for dequantize in ("layer", "resident"):
                taken = seconds(folder, dtype, nf4(dtype), dequantize, arguments)
                print(f"{name:9s} NF4 {dequantize:10s} {taken:6.2f} s  {taken / plain:4.2f} x", flush=True)


if __name__ == "__main__":
    main()
