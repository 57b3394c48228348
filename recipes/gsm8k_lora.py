r"""GSM8K with R1's recipe: a LoRA adapter trained by GRPO on format + accuracy rewards.

Command (one GPU):

    python recipes/gsm8k_lora.py --model Qwen/Qwen2.5-1.5B-Instruct --output-dir gsm8k-lora

    with GSM8K in a local file (JSON Lines with `question` and `answer`, may be gzipped):
        --dataset path/to/train.jsonl.gz
    for a smaller card, the base weights in 4 bits: recipes/gsm8k_qlora.py, with the same arguments

Hardware: the defaults are meant for one 24 GB GPU (an estimate; peak memory not yet measured).
Time: not yet measured.
Number to expect: not yet measured (the rewards' means, `rewards/accuracy_reward/mean` and
`rewards/think_answer_format_reward/mean`, should rise; the most they can reach is 1.0 each).

The system prompt is DeepSeek-R1's (arXiv:2501.12948, Table 1), the rewards are its two (§2.2.2): 1 for
`<think>..</think><answer>..</answer>` and nothing else, 1 for the right final answer. GSM8K's gold answers are what
follows `####` in its worked solutions; the solutions themselves are not shown to the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_grpo_ext import GRPOConfig, GRPOTrainer, accuracy_reward, think_answer_format_reward

SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think><answer> answer here </answer>."
)
_FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def make_parser(kind: str = "lora") -> argparse.ArgumentParser:
    """The arguments of this recipe, and of `gsm8k_qlora.py`."""
    parser = argparse.ArgumentParser(
        description="Train an adapter on GSM8K with GRPO, R1's system prompt, and format + accuracy rewards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="Hub id or local folder of a chat model")
    add("--dataset", default="openai/gsm8k", help="Hub id, or a local .jsonl or .jsonl.gz with `question` and `answer`")
    add("--dataset-config", default="main", help="configuration of a Hub dataset")
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


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with paths that are not there refused before anything is loaded."""
    arguments = parser.parse_args(argv)
    problem = _path_problem(arguments)
    if problem:
        parser.error(problem)
    return arguments


def load_gsm8k(dataset: str, config: str = "main", split: str = "train") -> Dataset:
    """GSM8K's rows as {"prompt": [system, user], "solution": the gold answer}.

    Raises:
        ValueError: a column is missing, or an answer has no `####`.
    """
    if dataset.endswith(_FILE_ENDINGS):
        rows = load_dataset("json", data_files=str(Path(dataset).expanduser()), split="train")
    else:
        rows = load_dataset(dataset, config, split=split)
    missing = [column for column in ("question", "answer") if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"--dataset {dataset} has no column {missing}: GSM8K's rows have `question` and `answer` (the worked "
            f"solution, ending in '#### <gold>'), these have {rows.column_names}."
        )
    return rows.map(_to_prompt_and_gold, with_indices=True, remove_columns=rows.column_names)


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
    train_dataset = load_gsm8k(arguments.dataset, arguments.dataset_config, arguments.dataset_split)
    print(f"{len(train_dataset)} questions from {arguments.dataset}, the first one:")
    print(f"  {train_dataset[0]['prompt'][-1]['content']}  ->  {train_dataset[0]['solution']}", flush=True)

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
    return train(parse_arguments(make_parser(), argv))


def _path_problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with a path on the command line; a Hub id is left for the Hub to judge."""
    dataset, model = Path(arguments.dataset).expanduser(), Path(arguments.model).expanduser()
    if (arguments.dataset.endswith(_FILE_ENDINGS) or _looks_like_path(arguments.dataset)) and not dataset.is_file():
        return f"--dataset {arguments.dataset}: no such file. Give a .jsonl or .jsonl.gz file, or a Hub id."
    if dataset.is_file() and not arguments.dataset.endswith(_FILE_ENDINGS):
        return f"--dataset {arguments.dataset}: a local file must end in one of {', '.join(_FILE_ENDINGS)}."
    if _looks_like_path(arguments.model) and not model.is_dir():
        return f"--model {arguments.model}: no such folder. Give a folder saved by `save_pretrained`, or a Hub id."
    if model.is_dir() and not (model / "config.json").is_file():
        return f"--model {arguments.model}: the folder holds no config.json, so it is not a saved model."
    return None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _to_prompt_and_gold(row: dict[str, Any], index: int) -> dict[str, Any]:
    _, marker, gold = str(row["answer"]).rpartition("####")
    if not marker or not gold.strip():
        raise ValueError(
            f"row {index} of the dataset has no gold answer: its `answer` must end in '#### <gold>', "
            f"it is {row['answer'][-200:]!r}."
        )
    prompt = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["question"]}]
    return {"prompt": prompt, "solution": gold.strip()}


if __name__ == "__main__":
    main()
