"""Seconds, tokens per second and memory of an optimizer step: this package's GRPO trainer against TRL's.

    python benchmarks/step.py                          # all shapes that fit the machine, 3 runs of 3 steps per side
    python benchmarks/step.py --shape short --runs 1

The two sides run in turn, each run in a fresh process, on the same weights, prompts, sampling distribution and
settings (TRL's defaults for all that is not in the shape). Medians over the runs are printed, and kept in
`results/<shape>.json` and `RESULTS.md` when both sides ran.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).parent
SIDES = {"trl": "trl", "ours": "trl_grpo_ext"}  # side -> the module that has GRPOConfig and GRPOTrainer
PACKAGES = ("torch", "transformers", "trl", "peft")


# --- worker: one run of one side, in a process of its own ------------------------------------------------------------


def run_worker(options: argparse.Namespace) -> dict[str, Any]:
    """Train for `warmup + steps` optimizer steps and return what each measured one took."""
    import torch
    from memory import MemoryGrowth
    from transformers import TrainerCallback
    from workload import SHAPES, make_lora, make_model, make_prompts, make_tokenizer, token_hash_reward

    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    module = importlib.import_module(SIDES[options.worker])
    total_steps = options.warmup + options.steps
    lengths: list[int] = []  # of the completions of the step under way
    marks: list[tuple[float, float]] = []  # wall and CPU clock at the start of training and at each step's end
    step_lengths: list[list[int]] = []  # [steps][completions of that step]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [token_hash_reward(ids) for ids in completion_ids]

    class StepEnds(TrainerCallback):
        # From one step's end to the next is the only interval that holds all of a step for both trainers: TRL
        # generates inside `training_step`, this package before `on_step_begin`.
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if shape.device == "cuda":
                torch.cuda.synchronize()
            marks.append((time.perf_counter(), time.process_time()))
            step_lengths.append(lengths.copy())
            lengths.clear()

    model = make_model(shape)
    micro_batch = options.micro_batch
    completions = shape.prompts * shape.num_generations
    if completions % micro_batch:
        raise SystemExit(f"--micro-batch {micro_batch} must divide the step's {completions} completions")
    with tempfile.TemporaryDirectory() as output_dir:
        args = module.GRPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=completions // micro_batch,
            num_generations=shape.num_generations,
            max_completion_length=shape.completion_cap,
            beta=shape.beta,
            bf16=shape.dtype == torch.bfloat16,
            use_cpu=shape.device == "cpu",
            seed=options.seed,
            shuffle_dataset=False,  # step k has the same prompts on both sides
            max_steps=total_steps,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = module.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=args,
            train_dataset=make_prompts(shape, total_steps, model.config.vocab_size),
            processing_class=make_tokenizer(model.config.vocab_size),
            peft_config=make_lora(),
            callbacks=[StepEnds()],
        )
        rollout_seconds = ROLLOUT_CLOCKS[options.worker](trainer)
        with MemoryGrowth(shape.device) as memory:
            trainer.train()

    steps = []
    for index in range(options.warmup, total_steps):
        (start, cpu_start), (end, cpu_end) = marks[index : index + 2]
        seconds, rollout, scored = end - start, rollout_seconds()[index], step_lengths[index]
        if len(scored) != completions:
            raise RuntimeError(f"step {index} scored {len(scored)} completions, the shape has {completions}")
        steps.append(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_end - cpu_start,  # far below seconds * threads: the machine was not idle
                "rollout_seconds": rollout,
                "update_seconds": seconds - rollout,
                "completions": completions,
                "completion_tokens": sum(scored),
                "longest_completion": max(scored),
            }
        )
    return {
        "side": options.worker,
        "seed": options.seed,
        "micro_batch": micro_batch,
        "gradient_accumulation_steps": completions // micro_batch,
        "memory_growth_bytes": memory.bytes,
        "memory_method": memory.method,
        "steps": steps,
    }


def clock_trl_rollouts(trainer: Any) -> Any:
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


def read_logged_rollouts(trainer: Any) -> Any:
    """This package logs `time/rollout`. Returns a function giving the seconds per step."""
    return lambda: [entry["time/rollout"] for entry in trainer.state.log_history if "time/rollout" in entry]


ROLLOUT_CLOCKS = {"trl": clock_trl_rollouts, "ours": read_logged_rollouts}


# --- parent: both sides in turn, medians, table, files ---------------------------------------------------------------


def measure(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of one shape, the sides alternating."""
    runs = []
    for seed in range(options.runs):
        for side in options.sides:
            print(f"{shape}: run {seed + 1} of {options.runs}, {side} ...", file=sys.stderr, flush=True)
            runs.append(run_in_subprocess(shape, side, seed, options))
    return runs


def run_in_subprocess(shape: str, side: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, str(HERE / "step.py"), "--worker", side, "--shape", shape, "--seed", str(seed)]
        for name in ("steps", "warmup", "threads", "micro_batch"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(options.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.run(
            [*command, "--out", str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if process.returncode:
            raise SystemExit(f"the {side} worker failed on {shape}:\n{process.stdout[-6000:]}")
        return json.loads(out.read_text())


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the runs of one side; a run's value is the mean of its measured steps."""

    def per_run(name: str) -> list[float]:
        return [mean(step[name] for step in run["steps"]) for run in runs]

    def rate(name: str) -> float:
        return median(
            tokens / seconds for tokens, seconds in zip(per_run("completion_tokens"), per_run(name), strict=True)
        )

    return {
        "seconds_per_step": median(per_run("seconds")),
        "rollout_seconds": median(per_run("rollout_seconds")),
        "update_seconds": median(per_run("update_seconds")),
        "rollout_tokens_per_second": rate("rollout_seconds"),
        "update_tokens_per_second": rate("update_seconds"),
        "step_tokens_per_second": rate("seconds"),
        "memory_growth_gib": median(run["memory_growth_bytes"] for run in runs) / 2**30,
        "completions_per_step": median(per_run("completions")),
        "mean_completion_length": sum(map(sum, ([s["completion_tokens"] for s in run["steps"]] for run in runs)))
        / sum(map(sum, ([s["completions"] for s in run["steps"]] for run in runs))),
    }


ROWS = (  # key, label, format
    ("seconds_per_step", "seconds per step", "{:.2f}"),
    ("rollout_seconds", "of them rollouts", "{:.2f}"),
    ("update_seconds", "of them the rest", "{:.2f}"),
    ("rollout_tokens_per_second", "rollout tokens/s", "{:.0f}"),
    ("update_tokens_per_second", "update tokens/s", "{:.0f}"),
    ("step_tokens_per_second", "step tokens/s", "{:.0f}"),
    ("memory_growth_gib", "growth of peak memory, GiB", "{:.2f}"),
    ("completions_per_step", "completions per step", "{:.0f}"),
    ("mean_completion_length", "mean completion length", "{:.1f}"),
)


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """Label, one column per side, and, if both ran, their ratio and its target."""
    sides = result["medians"]
    rows = []
    for key, label, layout in ROWS:
        row = [label, *(layout.format(values[key]) for values in sides.values())]
        if len(sides) == 2:
            target = result["targets"].get(key)
            row += [f"{sides['ours'][key] / sides['trl'][key]:.3f}", f"<= {target}" if target else ""]
        rows.append(row)
    return rows


def header(result: dict[str, Any]) -> list[str]:
    sides = list(result["medians"])
    return ["", *sides, *(["ours / trl", "target"] if len(sides) == 2 else [])]


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['shape']}: {result['load']}")
    for number, name in enumerate(header(result)):
        table.add_column(name, justify="right" if number else "left")
    for row in table_rows(result):
        table.add_row(*row)
    Console().print(table)


def write_report(folder: Path) -> None:
    """RESULTS.md from every `results/*.json`, so that one shape can be measured again alone."""
    from workload import SHAPES

    text = [
        "# Results",
        "",
        "Written by `benchmarks/step.py`; see `README.md` for what is measured and how. Medians over the runs.",
    ]
    for name in SHAPES:
        path = folder / "results" / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        machine = result["machine"]
        text += ["", f"## {name}", "", result["load"] + ".", "", "| " + " | ".join(header(result)) + " |"]
        text += ["|---|" + "---:|" * (len(header(result)) - 1)]
        text += ["| " + " | ".join(row) + " |" for row in table_rows(result)]
        packages = ", ".join(f"{package} {number}" for package, number in machine["packages"].items())
        text += [
            "",
            f"{result['date']}; {machine['device']}, {machine['threads']} of {machine['cores']} cores used, load average "
            f"before the start {machine['load_average_before']}; {machine['system']}; Python {machine['python']}; "
            f"{packages}. {result['runs_per_side']} alternating runs per side of {result['steps_per_run']} measured "
            f"steps after {result['warmup_steps']}; memory by {result['memory_method']}.",
        ]
    (folder / "RESULTS.md").write_text("\n".join(text) + "\n")


def describe_machine(threads: int, device: str) -> dict[str, Any]:
    import torch

    models = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    cpu = models[0].split(":")[1].strip() if models else platform.processor()
    return {
        "device": f"{torch.cuda.get_device_name()} ({cpu})" if device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def run_shape(name: str, options: argparse.Namespace) -> dict[str, Any]:
    from workload import SHAPES

    shape = SHAPES[name]
    machine = describe_machine(options.threads, shape.device)
    runs = measure(name, options)
    medians = {side: summarise([run for run in runs if run["side"] == side]) for side in options.sides}
    targets = {"seconds_per_step": shape.seconds_target, "memory_growth_gib": shape.memory_target}
    return {
        "shape": name,
        "load": f"{shape.prompts} prompts of ~{shape.prompt_tokens} tokens, G={shape.num_generations}, completions of mean "
        f"{shape.completion_mean}, cap {shape.completion_cap}, beta {shape.beta}, micro-batches of {options.micro_batch}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "runs_per_side": options.runs,
        "steps_per_run": options.steps,
        "warmup_steps": options.warmup,
        "memory_method": runs[0]["memory_method"],
        "medians": medians,
        "targets": {key: value for key, value in targets.items() if value is not None},
        "runs": runs,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", help="default: standard long-prompt short, and gpu-1.5b if CUDA is there")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--runs", type=int, default=3, help="per side, alternating")
    parser.add_argument("--steps", type=int, default=2, help="measured optimizer steps per run")
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps before them (at least 1)")
    parser.add_argument("--micro-batch", type=int, default=8, help="per_device_train_batch_size; 8 is TRL's default")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the workers; default: all cores")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of RESULTS.md and results/")
    internal = parser.add_argument_group("used by the parent process")
    internal.add_argument("--worker", choices=SIDES)
    internal.add_argument("--seed", type=int, default=0)
    internal.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.warmup < 1:
        parser.error(f"--warmup {options.warmup}: the first step also compiles kernels and has no step end before it")
    return options


def main() -> None:
    options = parse_arguments()
    if options.worker:
        (options.shape,) = options.shape
        options.out.write_text(json.dumps(run_worker(options)))
        return
    import torch
    from workload import SHAPES

    for name in options.shape or [n for n, s in SHAPES.items() if s.device == "cpu" or torch.cuda.is_available()]:
        result = run_shape(name, options)
        print_table(result)
        if len(options.sides) == len(SIDES):  # one side alone is no comparison: print only
            (options.results / "results").mkdir(parents=True, exist_ok=True)
            (options.results / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            write_report(options.results)


if __name__ == "__main__":
    main()
