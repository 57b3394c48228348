"""What `test_two_processes.py` runs in every process: a few optimizer steps of each case on a tiny model.

torchrun --nproc_per_node 2 two_processes.py MODEL OUTPUT PER_DEVICE_BATCH
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from trl_grpo_ext import GRPOConfig, GRPOTrainer

CASES: dict[str, dict[str, Any]] = {
    "kl": {"beta": 0.04, "loss_type": "dapo", "log_completions": True, "num_completions_to_print": 1},
    "accumulation and two iterations": {"gradient_accumulation_steps": 2, "num_iterations": 2, "loss_type": "grpo"}
    | {"max_steps": 4, "learning_rate": 0.5},
    # Nothing to train on in one of the processes, and in a micro-batch of the other: neither may wait in vain
    "zero variance": {"beta": 0.0, "loss_type": "dr_grpo", "gradient_accumulation_steps": 2},
    "zero variance, padded rows": {"gradient_accumulation_steps": 2, "attention_packing": "off"},
    "reference that follows": {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3},
    # Groups draw on, in one process more than in the other
    "adaptive groups": {"num_generations_max": 8, "loss_type": "dapo", "gradient_accumulation_steps": 2},
    # Each process chooses from what all have seen
    "curriculum": {"curriculum": "pass_rate", "curriculum_floor": 0.3, "max_steps": 4},
    # 8 prompts, 4 in a generation, each trained on in 2 steps: an epoch has 4
    "second epoch": {"num_iterations": 2, "max_steps": 7, "save_strategy": "steps", "save_steps": 5},
}
# Inside a generation of epoch 1, whose other generation is then drawn in that epoch's order
RESUMED = {"second epoch": 5}
PROMPTS = ["ab", "question", "cde?", "x", "forty two", "hi you", "why", "a longer one"]


def token_sum(
    prompts: list[str], completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **kwargs: Any
) -> list[float]:
    """Tells completions apart, and logs metrics and a column that some processes have and others have not."""
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        log_metric("mean_of_all", len(ids))
        if prompt == "x":
            log_metric("only_of_x", len(ids))
    if "x" in prompts:
        log_extra("prompt_length", [len(prompt) for prompt in prompts])
    return [sum((i + 1) * token for i, token in enumerate(ids)) % 11 / 3.0 for ids in completion_ids]


def only_x(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Constant but for one prompt, so that only one process, and only one of its micro-batches, has a gradient."""
    return [r if p == "x" else 0.5 for p, r in zip(prompts, token_sum(prompts, completion_ids, **kwargs), strict=True)]


def rare(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for about one completion in five, so that most groups of 3 have no signal."""
    return [float(r == 0) for r in token_sum(prompts, [ids[:2] for ids in completion_ids], **kwargs)]


def make_trainer(model: str, output: str, case: str, batch: int) -> GRPOTrainer:
    args = GRPOConfig(
        **{
            "output_dir": output,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "reward_workers": 0,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "learning_rate": 0.1,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "seed": 3,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 3,
            "num_generations": 3,
            "max_completion_length": 7,
            "max_steps": 2,
            "eval_pass_at_k": [1, 2],
        }
        | CASES[case]
    )
    return GRPOTrainer(
        model,
        only_x if "zero variance" in case else rare if "adaptive" in case else token_sum,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        # Odd, so that one process has nothing in the last round
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def run(model: str, output: str, case: str, batch: int, checkpoint: str | None = None) -> GRPOTrainer:
    """Train, evaluate, and leave the adapter and the log in `output`."""
    trainer = make_trainer(model, output, case, batch)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate()
    trainer.save_model(output)
    if trainer.accelerator.is_main_process:
        Path(output, "history.json").write_text(json.dumps(trainer.state.log_history))
    return trainer


def run_without_the_last_file(trainer: GRPOTrainer, output: str, checkpoint: str) -> None:
    """Resume where the last process has lost its file, and leave every process's error in `output`."""
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    if rank == processes - 1:
        Path(checkpoint, f"grpo_state_{rank}.pt").unlink()
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        Path(output, f"error_{rank}.txt").write_text(str(error))


def main(model: str, output: str, batch: str) -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:  # accelerate would let a process wait in vain for half an hour
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in CASES:
        run(model, str(Path(output, case)), case, int(batch))
    for case, step in RESUMED.items():
        folder, checkpoint = str(Path(output, f"{case}, resumed")), str(Path(output, case, f"checkpoint-{step}"))
        trainer = run(model, folder, case, int(batch), checkpoint)
        run_without_the_last_file(trainer, folder, checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():  # or gloo's threads may outlive Python, and abort its end
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
