r"""GSM8K with R1's recipe: a LoRA adapter trained by GRPO on format + accuracy rewards.

Command (one GPU):

    python recipes/gsm8k_lora.py --model Qwen/Qwen2.5-1.5B-Instruct --output-dir gsm8k-lora

    with GSM8K in a local file (JSON Lines, Parquet or CSV with `question` and `answer`, may be gzipped):
        --dataset gsm8k:path/to/train.jsonl.gz
    for a smaller card, the base weights in 4 bits: recipes/gsm8k_qlora.py, with the same arguments

Hardware: the defaults are meant for one 24 GB GPU (an estimate; peak memory not yet measured).
Time: not yet measured.
Number to expect: not yet measured (the rewards' means, `rewards/accuracy_reward/mean` and
`rewards/think_answer_format_reward/mean`, should rise; the most they can reach is 1.0 each).

The prompts are `load_prompts("gsm8k")`: DeepSeek-R1's system prompt (arXiv:2501.12948, Table 1), and as gold answer
what follows `####` in the worked solution, which is not shown to the model. The rewards are R1's two (§2.2.2): 1 for
`<think>..</think><answer>..</answer>` and nothing else, 1 for the right final answer. recipes/gsm8k_lora.yaml is such a
run without code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_grpo_ext import (
    GRPOConfig,
    GRPOTrainer,
    PromptReport,
    accuracy_reward,
    load_prompts,
    think_answer_format_reward,
)


def make_parser(kind: str = "lora") -> argparse.ArgumentParser:
    """The arguments of this recipe, and of `gsm8k_qlora.py`."""
    parser = argparse.ArgumentParser(
        description="Train an adapter on GSM8K with GRPO, R1's system prompt, and format + accuracy rewards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="Hub id or local folder of a chat model")
    add("--dataset", default="gsm8k", help="GSM8K on the Hub, or a local copy as gsm8k:FILE")
    add("--dataset-split", default="train", help="split of a Hub dataset")
    add("--output-dir", default=f"gsm8k-{kind}", help="where the adapter and the checkpoints go")
    add("--max-steps", type=int, default=200, help="optimizer steps")
    add("--num-generations", type=int, default=8, help="completions per question (the group size G)")
    add("--per-device-train-batch-size", type=int, default=8, help="completions per micro-batch")
    add("--gradient-accumulation-steps", type=int, default=8, help="micro-batches per optimizer step")
    add("--learning-rate", type=float, default=1e-5, help="peak learning rate of AdamW")
    add("--beta", type=float, default=0.0, help="KL coefficient; at 0 there is no reference")
    add("--temperature", type=float, default=1.0, help="sampling temperature")
    add("--max-completion-length", type=int, default=512, help="tokens of a completion, at most")
    add("--lora-r", type=int, default=16, help="rank of the adapter")
    add("--lora-alpha", type=int, default=32, help="the adapter's output is scaled by alpha / r")
    add("--save-steps", type=int, default=100, help="optimizer steps between checkpoints")
    add("--logging-steps", type=int, default=1, help="optimizer steps between log lines")
    add("--report-to", default="none", help="where to log to: none, wandb, tensorboard, trackio, ...")
    add("--seed", type=int, default=0, help="seed of the adapter, the data order and the sampling")
    return parser


def train(
    arguments: argparse.Namespace, quantization_config: BitsAndBytesConfig | None = None, **settings: Any
) -> GRPOTrainer:
    """Train, save the adapter, and say how to load it. `settings` are further fields of the config."""
    config = GRPOConfig(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        num_generations=arguments.num_generations,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        beta=arguments.beta,
        temperature=arguments.temperature,
        max_completion_length=arguments.max_completion_length,
        save_steps=arguments.save_steps,
        logging_steps=arguments.logging_steps,
        report_to=arguments.report_to,
        seed=arguments.seed,
        **settings,
    )
    report = PromptReport()
    train_dataset = load_prompts(arguments.dataset, split=arguments.dataset_split, template="r1", report=report)
    print(report)
    print(f"  {train_dataset[0]['problem']}  ->  {train_dataset[0]['solution']}", flush=True)

    trainer = GRPOTrainer(
        model=arguments.model,
        reward_funcs=[think_answer_format_reward, accuracy_reward],
        args=config,
        train_dataset=train_dataset,
        quantization_config=quantization_config,
        peft_config=LoraConfig(
            r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model()
    print(f"The adapter is in {arguments.output_dir}. To use it:")
    print("  from peft import AutoPeftModelForCausalLM")
    print(f"  model = AutoPeftModelForCausalLM.from_pretrained({arguments.output_dir!r})")
    return trainer


def main(argv: Sequence[str] | None = None) -> GRPOTrainer:
    return train(make_parser().parse_args(argv))


if __name__ == "__main__":
    main()
