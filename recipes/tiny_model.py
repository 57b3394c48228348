"""Models and data for the `tiny_*.yaml` recipes: 0.9M parameters, warmed up by imitation until a third is right.

    python recipes/tiny_model.py --output-dir outputs/tiny
    trl-grpo train --config recipes/tiny_arithmetic.yaml

Writes `OUTPUT_DIR/arithmetic`, `countdown` and `math`: a model with its tokenizer each, which `transformers` loads, and
beside it `train.jsonl` and `test.jsonl` with the problems for GRPO. The additions are the quickstart's
(`embedded_task.py`). A countdown asks for an equation that uses three numbers once each, with + and -, and makes the
target; its worked form is one that adds up:

    prompt       7 12 4=15
    completion   <think>7+12=19 19-4=15</think><answer>7+12-4</answer>

`math` has the columns of MATH (problem, solution, level, type): sums of two to four numbers, whose level is the number
of operations. As in many a training set, some of the test problems have slipped into it: the recipe leaves them out.

    prompt       7+12-4=
    completion   7+12=19 19-4=15 \\boxed{15}

Hardware: any CPU (it uses one core). No network.
Time: 2 to 3 minutes for all three.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries are imported, which read it once

import datasets
import torch
from embedded_task import MAX_COMPLETION_LENGTH, make_model, make_splits, make_tokenizer
from quickstart import MAX_WARM_UP_STEPS, WARM_UP_GOAL, common_arguments, complete, console, quiet_libraries
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trl_grpo_ext import accuracy_reward
from trl_grpo_ext.rewards import countdown_reward

COUNTDOWN_CHARACTERS = "0123456789+-= "
BOX = ("\\boxed{", "}")
LEAKED = 25  # test problems among those for GRPO

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of problem: rows with `problem` and `answer`, those to imitate with `completion` too."""

    characters: str  # that its prompts and completions are written in, beside the tags
    warm_up: list[Row]
    validation: list[Row]
    train: list[Row]
    test: list[Row]
    right: Callable[[list[str], list[Row]], Sequence[float | None]]  # completions -> 1 or 0 each
    words: tuple[str, ...] = ()  # tokens of more than one character


def additions(seed: int) -> Task:
    """The quickstart's task, and its splits."""
    splits = make_splits(seed)

    def renamed(rows: list[dict[str, str]]) -> list[Row]:
        return [
            {"problem": row["prompt"], "answer": row["solution"]}
            | ({"completion": row["completion"]} if "completion" in row else {})
            for row in rows
        ]

    def right(texts: list[str], rows: list[Row]) -> Sequence[float | None]:
        return accuracy_reward(texts, solution=[row["answer"] for row in rows])

    return Task(
        "0123456789+= ",
        renamed(splits.warm_up),
        renamed(splits.validation),
        renamed(splits.practice),
        renamed(splits.held_out),
        right,
    )


def worked_countdown(nums: Sequence[int], signs: Sequence[int]) -> str:
    """The completion that adds and subtracts the numbers in their order; the first one is added."""
    value, equation, steps = nums[0], str(nums[0]), []
    for number, sign in zip(nums[1:], signs, strict=True):
        operation = f"{'+' if sign > 0 else '-'}{number}"
        steps.append(f"{value}{operation}={value + sign * number}")
        value += sign * number
        equation += operation
    return f"<think>{' '.join(steps)}</think><answer>{equation}</answer>"


def countdowns(seed: int, *, warm_up: int = 3000, train: int = 1500, validation: int = 200, test: int = 400) -> Task:
    """Three numbers up to 20 and a target that they make; no two problems have the same numbers and target."""
    rng = random.Random(seed)
    rows: dict[tuple[Any, ...], Row] = {}
    while len(rows) < warm_up + train + validation + test:
        nums = [rng.randint(1, 20) for _ in range(3)]
        signs = [rng.choice((1, -1)) for _ in range(2)]
        target = nums[0] + sum(sign * number for sign, number in zip(signs, nums[1:], strict=True))
        partial = nums[0] + signs[0] * nums[1]
        if target < 1 or partial < 1:
            continue
        row = {
            "problem": f"{' '.join(map(str, nums))}={target}",
            "answer": str(target),
            "nums": nums,
            "target": target,
            "completion": worked_countdown(nums, signs),
        }
        rows.setdefault((*sorted(nums), target), row)
    drawn = iter(rows.values())
    parts = [[next(drawn) for _ in range(size)] for size in (test, validation, train, warm_up)]
    for row in (row for part in parts[:3] for row in part):
        del row["completion"]  # from here on it is checked, not shown

    def right(texts: list[str], rows: list[Row]) -> Sequence[float | None]:
        columns = {name: [row[name] for row in rows] for name in ("target", "nums")}
        return countdown_reward(texts, **columns)

    return Task(COUNTDOWN_CHARACTERS, parts[3], parts[1], parts[2], parts[0], right)


def worked_sum(numbers: Sequence[int], signs: Sequence[int]) -> str:
    """The completion for a sum: one operation after the other, the result in a box."""
    value, steps = numbers[0], []
    for number, sign in zip(numbers[1:], signs, strict=True):
        steps.append(f"{value}{'+' if sign > 0 else '-'}{number}={value + sign * number}")
        value += sign * number
    return f"{' '.join(steps)} {BOX[0]}{value}{BOX[1]}"


def sums(seed: int, *, warm_up: int = 3000, train: int = 1500, validation: int = 200, test: int = 400) -> Task:
    """Two to four numbers up to 20, added and subtracted, never below zero on the way; no two are the same."""
    rng = random.Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < warm_up + train + validation + test:
        operations = rng.choice((1, 2, 2, 3))
        numbers = [rng.randint(1, 20) for _ in range(operations + 1)]
        signs = [rng.choice((1, -1)) for _ in range(operations)]
        partial = list(accumulate([numbers[0], *(s * n for s, n in zip(signs, numbers[1:], strict=True))]))
        if min(partial) < 0:
            continue
        problem = str(numbers[0]) + "".join(f"{s * n:+d}" for s, n in zip(signs, numbers[1:], strict=True)) + "="
        worked = worked_sum(numbers, signs)
        kind = "Mixed" if len(set(signs)) > 1 else "Addition" if signs[0] > 0 else "Subtraction"
        row = {"problem": problem, "solution": worked, "answer": str(partial[-1])}
        rows.setdefault(problem, row | {"level": f"Level {operations}", "type": kind, "completion": worked})
    drawn = iter(rows.values())
    parts = [[next(drawn) for _ in range(size)] for size in (test, validation, train, warm_up)]
    for row in (row for part in parts[:3] for row in part):
        del row["completion"]
    practice = [*parts[2], *parts[0][:LEAKED]]
    rng.shuffle(practice)

    def right(texts: list[str], rows: list[Row]) -> Sequence[float | None]:
        return accuracy_reward(texts, solution=[row["solution"] for row in rows])

    return Task(COUNTDOWN_CHARACTERS, parts[3], parts[1], practice, parts[0], right, BOX)


TASKS = {"arithmetic": additions, "countdown": countdowns, "math": sums}


class StopWhenRight(TrainerCallback):
    """Ends the warm-up where there is something to learn from, and something left to learn."""

    def __init__(self, task: Task, tokenizer: Any, every: int = 5) -> None:
        self.task, self.tokenizer, self.every = task, tokenizer, every
        self.accuracy = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check every few steps."""
        if state.global_step % self.every == 0:
            self.accuracy = score(model, self.tokenizer, self.task, self.task.validation)
            control.should_training_stop |= self.accuracy >= WARM_UP_GOAL


def score(model: Any, tokenizer: Any, task: Task, rows: list[Row]) -> float:
    """Share of problems that the model solves greedily."""
    texts, _ = complete(model, tokenizer, [{"prompt": row["problem"]} for row in rows], greedy=True)
    return mean(value or 0.0 for value in task.right(texts, rows))


def make(name: str, output_dir: Path, seed: int) -> float:
    """Warm a model up, write it and its data, and return its accuracy on the test problems.

    Raises:
        RuntimeError: if it does not learn enough: GRPO learns nothing where nothing is ever right.
    """
    started = time.perf_counter()
    task, folder = TASKS[name](seed), output_dir / name
    tokenizer = make_tokenizer(task.characters, task.words)
    watch = StopWhenRight(task, tokenizer)
    rows = [{"prompt": row["problem"], "completion": row["completion"]} for row in task.warm_up]
    trainer = SFTTrainer(
        model=make_model(tokenizer, seed),
        args=SFTConfig(
            **common_arguments(folder, seed),
            max_steps=MAX_WARM_UP_STEPS,
            per_device_train_batch_size=32,
            learning_rate=1.5e-3,
            warmup_steps=20,
            completion_only_loss=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if watch.accuracy < WARM_UP_GOAL:
        raise RuntimeError(
            f"{name}: the warm-up ended with {watch.accuracy:.0%} of the validation problems right, below "
            f"{WARM_UP_GOAL:.0%}; try another --seed"
        )
    trainer.save_model(str(folder))
    for split, part in (("train", task.train), ("test", task.test)):
        lines = (json.dumps(row) for row in part)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    accuracy = score(trainer.model, tokenizer, task, task.test)
    console.print(
        f"{folder}: {trainer.state.global_step} steps, {time.perf_counter() - started:.0f} s, right on {accuracy:.1%} "
        f"of {len(task.test)} test problems (completions of at most {MAX_COMPLETION_LENGTH} tokens)"
    )
    return accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the model and the warm-up")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    torch.set_num_threads(1)  # as in the quickstart: results of a seed do not depend on the number of cores
    for name in arguments.tasks:
        make(name, arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    main()
