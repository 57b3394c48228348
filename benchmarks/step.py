"""Seconds, tokens per second and memory of an optimizer step: this package's GRPO trainer against TRL's.

    python benchmarks/step.py                          # all shapes that fit the machine, 3 runs of 1 + 2 steps per side
    python benchmarks/step.py --shape short --runs 1

The two sides run in turn, each run in a fresh process (`worker.py`), on the same weights, prompts, sampling
distribution and settings (TRL's defaults for all that is not in the shape, see `workload.py`). Medians over the runs
are printed and, when both sides ran, kept in `results/<shape>.json` and `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import describe_machine, print_table, summarise, write_results
from worker import SIDES
from workload import SHAPES

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "trl", "peft")


def run_in_subprocess(shape: str, side: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, str(HERE / "worker.py"), "--side", side, "--shape", shape, "--out", str(out)]
        command += ["--seed", str(seed), "--steps", str(options.steps), "--warmup", str(options.warmup)]
        command += ["--micro-batch", str(options.micro_batch), "--threads", str(options.threads)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),  # this checkout
            "OMP_NUM_THREADS": str(options.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if process.returncode:
            raise SystemExit(f"the {side} worker failed on {shape}:\n{process.stdout[-6000:]}")
        return json.loads(out.read_text())


def measure(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of one shape, the sides alternating."""
    runs = []
    for seed in range(options.runs):
        for side in options.sides:
            print(f"{shape}: run {seed + 1} of {options.runs}, {side} ...", file=sys.stderr, flush=True)
            runs.append(run_in_subprocess(shape, side, seed, options))
    return runs


def describe(threads: int, device: str) -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": f"{torch.cuda.get_device_name()} ({cpu})" if device == "cuda" else cpu,
        "threads": threads,
        **describe_machine(PACKAGES),
    }


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one shape and describe the outcome: load, machine, medians per side, and every run in full."""
    shape = SHAPES[name]
    machine = describe(options.threads, shape.device)
    runs = measure(name, options)
    targets = {"seconds_per_step": shape.seconds_target, "memory_growth_gib": shape.memory_target}
    return {
        "shape": name,
        "load": f"{shape.prompts} prompts of ~{shape.prompt_tokens} tokens, G={shape.num_generations}, completions of "
        f"mean {shape.completion_mean}, cap {shape.completion_cap}, beta {shape.beta}, "
        f"micro-batches of {options.micro_batch}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "runs_per_side": options.runs,
        "steps_per_run": options.steps,
        "warmup_steps": options.warmup,
        "memory_method": runs[0]["memory_method"],
        "targets": {key: value for key, value in targets.items() if value is not None},
        "medians": {side: summarise([run for run in runs if run["side"] == side]) for side in options.sides},
        "runs": runs,
    }


def parse_arguments() -> argparse.Namespace:
    runnable = [name for name, shape in SHAPES.items() if shape.device == "cpu" or torch.cuda.is_available()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=runnable, help="default: all this machine can run"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--runs", type=int, default=3, help="per side, alternating")
    parser.add_argument("--steps", type=int, default=2, help="measured optimizer steps per run")
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps before these")
    parser.add_argument(
        "--micro-batch", type=int, default=8, help="per_device_train_batch_size; 8 is the default of TRL"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the workers; default: all cores")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md and results/")
    options = parser.parse_args()
    if missing := [name for name in options.shape if name not in runnable]:
        parser.error(f"--shape {' '.join(missing)} needs CUDA, which PyTorch does not find here")
    return options


def main() -> None:
    options = parse_arguments()
    for name in options.shape:
        result = compare(name, options)
        print_table(result)
        if len(result["medians"]) == len(SIDES):  # one side alone is no comparison: print only
            write_results(result, options.results)


if __name__ == "__main__":
    main()
