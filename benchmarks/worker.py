"""One run of one side in a process of its own; started by `step.py`, which says what is measured.

python benchmarks/worker.py --side trl --shape short --out run.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import MemoryGrowth
from transformers import TrainerCallback
from workload import SHAPES, Shape, make_lora, make_model, make_prompts, make_tokenizer, token_hash_reward

SIDES = {"trl": "trl", "ours": "trl_grpo_ext"}  # side -> the module that has GRPOConfig and GRPOTrainer


class StepRecorder(TrainerCallback):
    """Notes when each optimizer step ended and which completions it scored, in the same way for both trainers.

    From one step's end to the next is the only interval that holds all of a step for both: TRL generates inside
    `training_step`, this package before `on_step_begin`.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []  # wall and CPU clock: start of training, then every step's end
        self.lengths: list[list[int]] = [[]]  # [steps][completions of that step], the last one being filled

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.lengths[-1].extend(len(ids) for ids in completion_ids)
        return [token_hash_reward(ids) for ids in completion_ids]

    # It keeps state, so this package must not call it in a worker process (`in_process`, said without importing it)
    reward.reward_runs_in_process = True  # type: ignore[attr-defined]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._mark()
        self.lengths.append([])

    def _mark(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))


def clock_trl_rollouts(trainer: Any) -> Callable[[], list[float]]:
    """TRL logs no rollout time: wrap the method that generates. Returns a function giving the seconds per step."""
    seconds: list[float] = []
    generate = trainer._generate_single_turn

    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = generate(*args, **kwargs)  # it ends with a copy to the CPU: no CUDA work is left under way
        seconds.append(time.perf_counter() - start)
        return output

    trainer._generate_single_turn = clocked
    return lambda: seconds


def read_logged_rollouts(trainer: Any) -> Callable[[], list[float]]:
    """This package logs `time/rollout`. Returns a function giving the seconds per step."""
    return lambda: [entry["time/rollout"] for entry in trainer.state.log_history if "time/rollout" in entry]


ROLLOUT_CLOCKS = {"trl": clock_trl_rollouts, "ours": read_logged_rollouts}


def make_trainer(
    side: str, shape: Shape, micro_batch: int, seed: int, steps: int, recorder: StepRecorder, output_dir: str
) -> Any:
    """The side's trainer on the shape's load; whatever is not named here keeps the trainer's default."""
    completions = shape.prompts * shape.num_generations
    if completions % micro_batch:
        raise SystemExit(f"--micro-batch {micro_batch} must divide the step's {completions} completions: choose 8, say")
    module = importlib.import_module(SIDES[side])
    model = make_model(shape)
    args = module.GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=completions // micro_batch,
        num_generations=shape.num_generations,
        max_completion_length=shape.completion_cap,
        beta=shape.beta,
        bf16=shape.dtype == torch.bfloat16,
        use_cpu=shape.device == "cpu",
        seed=seed,
        shuffle_dataset=False,  # step k has the same prompts on both sides
        max_steps=steps,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return module.GRPOTrainer(
        model=model,
        reward_funcs=recorder.reward,
        args=args,
        train_dataset=make_prompts(shape, steps, model.config.vocab_size),
        processing_class=make_tokenizer(model.config.vocab_size),
        peft_config=make_lora(),
        callbacks=[recorder],
    )


def run(side: str, shape: Shape, micro_batch: int, seed: int, warmup: int, steps: int) -> dict[str, Any]:
    """Train for `warmup + steps` optimizer steps and return what each of the last `steps` took."""
    recorder = StepRecorder()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(side, shape, micro_batch, seed, warmup + steps, recorder, output_dir)
        rollout_seconds = ROLLOUT_CLOCKS[side](trainer)
        with MemoryGrowth(shape.device) as memory:
            trainer.train()
    rollouts = rollout_seconds()
    if len(rollouts) != warmup + steps:
        raise RuntimeError(f"{side} generated {len(rollouts)} times in {warmup + steps} steps, expected once per step")
    measured = []
    for index in range(warmup, warmup + steps):
        (start, cpu_start), (end, cpu_end) = recorder.marks[index : index + 2]
        lengths = recorder.lengths[index]
        if len(lengths) != (expected := shape.prompts * shape.num_generations):
            raise RuntimeError(f"step {index} of {side} scored {len(lengths)} completions, the shape has {expected}")
        measured.append(
            {
                "seconds": end - start,
                "cpu_seconds": cpu_end - cpu_start,  # far below seconds * threads: the machine was not idle
                "rollout_seconds": rollouts[index],
                "update_seconds": end - start - rollouts[index],
                "completions": len(lengths),
                "completion_tokens": sum(lengths),
                "longest_completion": max(lengths),
            }
        )
    return {
        "side": side,
        "seed": seed,
        "memory_growth_bytes": memory.bytes,
        "memory_method": memory.method,
        "steps": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    result = run(options.side, shape, options.micro_batch, options.seed, options.warmup, options.steps)
    options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
