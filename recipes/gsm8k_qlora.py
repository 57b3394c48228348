r"""GSM8K with R1's recipe on a base in 4 bits: QLoRA (arXiv:2305.14314), trained by GRPO.

Command (one GPU, or a CPU for a small model):

    python recipes/gsm8k_qlora.py --model Qwen/Qwen2.5-1.5B-Instruct --output-dir gsm8k-qlora

    with model and GSM8K in local files:
        --model path/to/model --dataset gsm8k:path/to/train.jsonl.gz
    for faster rollouts, where there is room for the 16-bit weights while completions are drawn:
        --rollout-dequantize resident

Everything is as in `gsm8k_lora.py`, but for the base: its linear layers are stored as NF4, with the scales in 8 bits
(double quantization, §3 of the paper), and computed in `--compute-dtype`. The adapter is float32.

Hardware: the defaults are meant for one 16 GB GPU (an estimate; peak memory not yet measured).
Time: not yet measured.
Number to expect: not yet measured. `adapter/update_lost` should be near 0: the adapter moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from gsm8k_lora import make_parser, train
from transformers import BitsAndBytesConfig

from trl_grpo_ext import GRPOTrainer


def compute_dtype(arguments: argparse.Namespace) -> str:
    """What was asked for; else 16 bits on a GPU, and float32 on a CPU, most of which compute it faster."""
    if arguments.compute_dtype is not None:
        return str(arguments.compute_dtype)
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def main(argv: Sequence[str] | None = None) -> GRPOTrainer:
    parser = make_parser("qlora")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--compute-dtype", choices=dtypes, help="of products; if unset, by the device")
    parser.add_argument(
        "--rollout-dequantize",
        choices=("layer", "resident"),
        default="layer",
        help="resident: dequantized once per generation, faster, and takes the memory of the 16-bit weights meanwhile",
    )
    arguments = parser.parse_args(argv)
    dtype = compute_dtype(arguments)
    return train(
        arguments,
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        model_init_kwargs={"dtype": dtype},  # of what is not quantized: embeddings, norms, the LM head
        rollout_dequantize=arguments.rollout_dequantize,
    )


if __name__ == "__main__":
    main()
