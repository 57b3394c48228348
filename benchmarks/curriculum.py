"""`curriculum="pass_rate"` against uniform sampling: held-out accuracy by rollouts, practising on mixed difficulty.

    python benchmarks/curriculum.py                      # seeds 0, 1, 2; both sides
    python benchmarks/curriculum.py --seeds 0 --steps 50
    python benchmarks/curriculum.py --report             # the table of the results on disk, nothing is run

The model, the rewards and the held-out problems are the quickstart's (`recipes/quickstart.py`): a 0.9M-parameter Llama,
warmed up until a third of its answers are right; 400 additions of two and three digits, none of which is practised,
solved greedily every `--every` steps. The quickstart's practice set is drawn like its held-out one; this one, of 1,500,
is as mixed as one that nobody has looked through (the warm-up may have shown some of it):

    50 %  two digits, no carry         soon solved
    25 %  two digits, with a carry
    25 %  three digits                 hardly ever solved at the start

Both sides get the same set, model, adapter, settings and number of rollouts, 128 a step. `--practice quickstart` takes
the quickstart's own set instead (`results/curriculum_quickstart.json`).

Prints the rollouts after which accuracy first stayed at a level for two evaluations in a row, and accuracy at equal
rollouts, means and standard deviations over seeds, and writes `results/curriculum.json` and `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

from curriculum_report import print_tables
from report import write_markdown

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recipes"))

SIDES = {"uniform": {}, "curriculum": {"curriculum": "pass_rate"}}
SHARES = {"easy": 0.5, "carry": 0.25, "long": 0.25}
ROLLOUTS_PER_STEP = 128


def carries(a: int, b: int) -> bool:
    """Whether any column's sum is above 9."""
    return any(int(x) + int(y) > 9 for x, y in zip(str(a), str(b), strict=True))


def mixed_practice(rng: random.Random, size: int, taken: set[str]) -> list[dict[str, str]]:
    """`size` additions by `SHARES`, with their `kind`; none of them, either way round, is in `taken`."""
    rows: list[dict[str, str]] = []
    for kind, share in SHARES.items():
        first = len(rows)
        while len(rows) < first + round(share * size):
            digits = 3 if kind == "long" else 2
            a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            if taken & {f"{a}+{b}=", f"{b}+{a}="} or (digits == 2 and carries(a, b) == (kind == "easy")):
                continue
            taken.add(f"{a}+{b}=")
            rows.append({"prompt": f"{a}+{b}=", "solution": str(a + b), "kind": kind})
    return rows


def run(
    side: str, seed: int, set_name: str, steps: int, every: int, warm_model: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """One training; its curve."""
    import datasets
    import quickstart
    import torch
    from embedded_task import MAX_COMPLETION_LENGTH, make_splits
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    from trl_grpo_ext import GRPOConfig, GRPOTrainer

    quickstart.quiet_libraries()
    torch.set_num_threads(1)
    splits = make_splits(seed)
    if not warm_model.exists():
        quickstart.warm_up(warm_model, splits, seed)
    known = {row["prompt"] for rows in (splits.validation, splits.held_out) for row in rows}
    mixed = mixed_practice(random.Random(f"curriculum-{seed}"), len(splits.practice), known)
    practice = {"mixed": mixed, "quickstart": splits.practice}[set_name]
    tokenizer = AutoTokenizer.from_pretrained(warm_model)
    curve: list[dict[str, float]] = []

    def solved(model: Any, rows: list[dict[str, str]]) -> float:
        return quickstart.accuracy(quickstart.complete(model, tokenizer, rows, greedy=True)[0], rows)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                point = {"rollouts": state.global_step * ROLLOUTS_PER_STEP, "accuracy": solved(model, splits.held_out)}
                curve.append(point)
                print(f"{side}, seed {seed}: {point['rollouts']} rollouts, {point['accuracy']:.1%}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(warm_model),
            reward_funcs=quickstart.REWARDS["outcome"],
            args=GRPOConfig(
                **quickstart.common_arguments(Path(folder), seed),
                max_steps=steps,
                per_device_train_batch_size=ROLLOUTS_PER_STEP,
                num_generations=8,
                max_completion_length=MAX_COMPLETION_LENGTH,
                learning_rate=1.5e-3,
                warmup_steps=5,
                logging_steps=every,
                **SIDES[side],
                **options,
            ),
            train_dataset=datasets.Dataset.from_list(practice),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Watch()],
        )
        trainer.remove_callback(quickstart.PrinterCallback)
        curve.append({"rollouts": 0, "accuracy": solved(trainer.model, splits.held_out)})
        trainer.train()
    names = ("reward", "frac_reward_zero_std", "completions/mean_length", "tokens/packed")
    logs = [
        {name: entry[name] for name in entry if name in names or name.startswith("curriculum/")}
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    by_digits = {digits: [row for row in splits.held_out if row["prompt"].index("+") == digits] for digits in (2, 3)}
    return {
        "side": side,
        "seed": seed,
        "curve": curve,
        "by_digits": {str(digits): solved(trainer.model, rows) for digits, rows in by_digits.items()},
        "silent_groups": mean(entry["frac_reward_zero_std"] for entry in logs),
        "tokens_per_step": mean(entry["tokens/packed"] for entry in logs),
        "logs": logs,
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--practice", choices=("mixed", "quickstart"), default="mixed")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=10, help="steps from one evaluation to the next")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--warm-models", type=Path, help="folder of warm_<seed>; made and kept where missing")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, more fields of the curriculum's config")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--report", action="store_true", help="only print the results on disk")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # a run in a process of its own: where to write it
    arguments = parser.parse_args()
    file = arguments.results / ("curriculum.json" if arguments.practice == "mixed" else "curriculum_quickstart.json")
    if arguments.report:
        print_tables(json.loads(file.read_text())["runs"])
        write_markdown(arguments.results.parent)
        return
    if arguments.one is not None:
        (side,), (seed,) = arguments.sides, arguments.seeds
        options = arguments.options if side == "curriculum" else {}
        warm_model = arguments.warm_models / f"warm_{seed}"
        result = run(side, seed, arguments.practice, arguments.steps, arguments.every, warm_model, options)
        arguments.one.write_text(json.dumps(result))
        return
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for side in arguments.sides:
                written = Path(folder) / f"{side}_{seed}.json"
                command = [sys.executable, __file__, "--one", str(written), "--sides", side, "--seeds", str(seed)]
                command += [
                    "--practice",
                    arguments.practice,
                    "--steps",
                    str(arguments.steps),
                    "--every",
                    str(arguments.every),
                ]
                command += ["--warm-models", str(arguments.warm_models or folder)]
                command += ["--options", json.dumps(arguments.options)]
                environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
                subprocess.run(command, env=environment, check=True)
                runs.append(json.loads(written.read_text()))
    if set(arguments.sides) != set(SIDES):
        return
    print_tables(runs)
    arguments.results.mkdir(parents=True, exist_ok=True)
    settings = {
        "practice": arguments.practice,
        "steps": arguments.steps,
        "every": arguments.every,
        "options": arguments.options,
    }
    machine = {"date": date.today().isoformat(), "machine": platform.platform(), "cores": os.cpu_count()}
    file.write_text(json.dumps({**machine, **settings, "runs": runs}, indent=1) + "\n")
    write_markdown(arguments.results.parent)


if __name__ == "__main__":
    main()
