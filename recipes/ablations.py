r"""What each part of GRPO is worth, and what other baselines and a critic make of the same completions.

Command (two cores, under 30 minutes; a run that is done is not run again):

    python recipes/ablations.py --jobs 2
    python recipes/ablations.py --jobs 2 --methods ppo-4     # 15 minutes more
    TRL_WITH_PPO=... python recipes/ablations.py --jobs 2 --methods ppo-trl     # see ppo_trl.py
    python recipes/ablations.py --report       # what is done so far
    python recipes/ablations.py --smoke        # every method for two steps, in seconds

From one warmed-up model per seed (the quickstart's task and warm-up), every method trains an adapter on as many
completions, drawn by the same sampler and paid by the same rewards:

- full GRPO: G = 8, rewards divided by the group's standard deviation, KL to the reference with beta = 0.04;
- without the division (as Dr. GRPO, arXiv:2503.20783); without the KL; with G = 4 and G = 2, whose steps then have two
  and four times as many prompts;
- other baselines, all with the KL: RLOO (arXiv:2402.14740), ReMax (arXiv:2310.10505, whose greedy completions come on
  top), RAFT (arXiv:2304.06767), REINFORCE;
- PPO with a critic (`ppo_baseline.py`; TRL 1.16 has none), with one pass over each batch, as the others. When they are
  named: `ppo-4` makes four, and so four times as many updates, as is usual for PPO; `ppo-trl` is the trainer that TRL
  had until 1.12, in `trl.experimental.ppo` (`ppo_trl.py`).

One learning rate for all, that of the quickstart: no method was tuned, GRPO's was the one that it was chosen on.

Reported: held-out greedy accuracy, mean and standard deviation over the seeds; growth of peak memory of the run's
process; seconds of the clock and of the processor (the latter depend little on what else the machine does).
Writes `docs/ablations.md` and, beside it, `ablations/results.json`, `ablations.png` and `ablations.svg`.
Number to expect: the tables in docs/ablations.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import psutil
import torch
from datasets import Dataset
from embedded_task import MAX_COMPLETION_LENGTH, Row, Splits, make_model, make_splits, make_tokenizer
from peft import LoraConfig
from ppo_baseline import PPOSettings, train_ppo
from quickstart import common_arguments, evaluate, quiet_libraries, warm_up
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from trl_grpo_ext import GRPOConfig, GRPOTrainer, accuracy_reward, think_answer_format_reward

# Name -> (title, what differs from full GRPO); PPO is a trainer of its own
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("full GRPO (G = 8)", {}),
    "no-std": ("no std normalisation", {"scale_rewards": "none"}),
    "no-kl": ("no KL", {"beta": 0.0}),
    "g4": ("G = 4", {"num_generations": 4}),
    "g2": ("G = 2", {"num_generations": 2}),
    "rloo": ("RLOO", {"advantage_estimator": "rloo"}),
    "remax": ("ReMax", {"advantage_estimator": "remax"}),
    "raft": ("RAFT", {"advantage_estimator": "raft"}),
    "reinforce": ("REINFORCE", {"advantage_estimator": "reinforce"}),
    "ppo": ("PPO with a critic", {"epochs": 1}),
    "ppo-4": ("PPO with a critic, 4 epochs", {"epochs": 4}),
    "ppo-trl": ("PPO by trl.experimental.ppo", {"epochs": 1}),
}
# Of the others, one takes as long as five, and one needs an old TRL
UNASKED = tuple(name for name in METHODS if name not in ("ppo-4", "ppo-trl"))
START = "warm"  # in place of a method: the model that all of them start from
BETA, LEARNING_RATE = 0.04, 1.5e-3
HERE = Path(__file__).resolve().parent
console = Console(markup=False, highlight=False)


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def rewards_of(rows: Sequence[Row], texts: list[str]) -> list[float]:
    """The sum that GRPO's trainer is paid: right answer, right form."""
    right = accuracy_reward(texts, solution=[row["solution"] for row in rows])
    form = think_answer_format_reward(texts)
    return [a + b for a, b in zip(right, form, strict=True)]


def train(method: str, warm_model: Path, splits: Splits, seed: int, steps: int, completions: int, out: Path) -> Any:
    """The trained policy and its tokenizer."""
    if method.startswith("ppo"):
        tokenizer = AutoTokenizer.from_pretrained(warm_model)
        same: dict[str, Any] = {
            "lora": lora(),
            "steps": steps,
            "completions": completions,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "beta": BETA,
            "learning_rate": LEARNING_RATE,
            "seed": seed,
        }
        own = METHODS[method][1]
        if method == "ppo-trl":
            from ppo_trl import train_ppo_by_trl

            return train_ppo_by_trl(warm_model, splits.practice, rewards_of, out=out, **same, **own), tokenizer
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(warm_model).to(device)
        policy = train_ppo(model, tokenizer, splits.practice, rewards_of, settings=PPOSettings(**own), **same)
        return policy, tokenizer
    settings = {"num_generations": 8, "beta": BETA} | METHODS[method][1]
    trainer = GRPOTrainer(
        model=str(warm_model),
        reward_funcs=[accuracy_reward, think_answer_format_reward],
        args=GRPOConfig(
            **common_arguments(out, seed),
            **settings,
            max_steps=steps,
            per_device_train_batch_size=completions,
            max_completion_length=MAX_COMPLETION_LENGTH,
            learning_rate=LEARNING_RATE,
            warmup_steps=5,
            logging_steps=max(1, steps // 4),
        ),
        train_dataset=Dataset.from_list(splits.practice),
        peft_config=lora(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model, trainer.processing_class


class MemoryOfRun:
    """Growth of this process's peak memory, in bytes: PyTorch's on a GPU, else of the resident set."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if self.on_gpu else psutil.Process().memory_info().rss

    def growth(self) -> int:
        import resource

        if self.on_gpu:
            return torch.cuda.max_memory_allocated() - self.before
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - self.before


def run_one(method: str, seed: int, warm_model: Path, out: Path, steps: int, completions: int, held_out: int) -> None:
    """Train by one method, evaluate, and keep the figures in `out`."""
    splits = make_splits(seed)
    rows = splits.held_out[:held_out]
    memory, clock, processor = MemoryOfRun(), time.perf_counter(), time.process_time()
    policy, tokenizer = train(method, warm_model, splits, seed, steps, completions, out)
    seconds, cpu_seconds, growth = time.perf_counter() - clock, time.process_time() - processor, memory.growth()
    after = evaluate(policy, tokenizer, rows)
    result = {
        "method": method,
        "seed": seed,
        "steps": steps,
        "completions": completions * steps,
        **after.figures(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory_bytes": growth,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_start(folder: Path, seed: int, smoke: bool, held_out: int) -> None:
    """The warmed-up model that all methods start from, and its greedy accuracy."""
    if smoke:  # untrained: a smoke run shows that everything runs
        tokenizer = make_tokenizer()
        make_model(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        warm_up(folder, make_splits(seed), seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    accuracy = evaluate(model, tokenizer, make_splits(seed).held_out[:held_out]).accuracy
    (folder / "result.json").write_text(json.dumps({"seed": seed, "accuracy": accuracy}) + "\n", encoding="utf-8")


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method, in the order of `METHODS`: means over the seeds, and the accuracy's standard deviation.

    The difference is to full GRPO on the same seeds, which are not equally hard.
    """
    rows = []
    full = {result["seed"]: result["accuracy"] for result in results if result["method"] == "grpo"}
    for method, (title, _) in METHODS.items():
        own = [result for result in results if result["method"] == method]
        if own:
            accuracies = [result["accuracy"] for result in own]
            paired = [result["accuracy"] - full[result["seed"]] for result in own if result["seed"] in full]
            rows.append(
                {
                    "method": method,
                    "title": title,
                    "seeds": [result["seed"] for result in own],
                    "accuracies": accuracies,
                    "accuracy": mean(accuracies),
                    "difference": mean(paired) if paired and method != "grpo" else None,
                    "deviation": stdev(accuracies) if len(own) > 1 else None,
                    **{key: mean(result[key] for result in own) for key in ("memory_bytes", "seconds", "cpu_seconds")},
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | accuracy, % | sd | each seed | difference | memory, MiB | seconds | CPU seconds |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        spread = "" if row["deviation"] is None else f"{100 * row['deviation']:.1f}"
        each = ", ".join(f"{100 * accuracy:.1f}" for accuracy in row["accuracies"])
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        some = "" if row["seeds"] == rows[0]["seeds"] else f" (seeds {', '.join(map(str, row['seeds']))})"
        lines.append(
            f"| {row['title']}{some} | {100 * row['accuracy']:.1f} | {spread} | {each} | {difference} | "
            f"{row['memory_bytes'] / 2**20:.0f} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Accuracy (a dot per seed, the mean as a bar), memory and processor time, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ablations"  # the same figures give the same file
    from matplotlib import pyplot

    titles = [row["title"] for row in rows]
    places = list(range(len(rows)))
    panels = (("held-out accuracy, %", None), ("memory, MiB", "memory_bytes"), ("CPU seconds", "cpu_seconds"))
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 0.36 * len(rows) + 1.2), sharey=True, layout="constrained")
    for axis, (label, key) in zip(axes, panels, strict=True):
        scale = 100 if key is None else 1 / 2**20 if key == "memory_bytes" else 1
        axis.barh(places, [row[key or "accuracy"] * scale for row in rows], color="#56b4e9", height=0.6)
        axis.set_xlabel(label)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
    for place, row in zip(places, rows, strict=True):
        axes[0].plot(
            [100 * a for a in row["accuracies"]], [place] * len(row["seeds"]), "o", color="#d55e00", markersize=4
        )
    axes[0].set_yticks(places, titles)
    axes[0].invert_yaxis()
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(folder / f"ablations.{kind}", dpi=120, metadata=metadata)
    pyplot.close(figure)


def write_report(results: list[dict[str, Any]], before: dict[int, float], docs: Path, commands: list[str]) -> str:
    """`ablations.md`, its figure and its figures; returns the table."""
    rows, folder = summarise(results), docs / "ablations"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"commands": commands, "accuracy_before": before, "summary": rows, "runs": results}
    (folder / "results.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    draw(rows, folder)
    steps, completions = results[0]["steps"], results[0]["completions"]
    starts = ", ".join(f"{100 * accuracy:.1f}" for accuracy in before.values())
    text = f"""# Ablations and baselines

Written by {" and ".join(f"`{command}`" for command in commands)}.
The quickstart's additions: {steps} steps of {completions // steps} completions by every method, from models that solve
{starts} % (seeds {", ".join(map(str, before))}) of the held-out problems. What the methods are, and what is the same
for all of them, is said at the top of `recipes/ablations.py`.

{table(rows)}

![accuracy, memory and processor time by method](ablations/ablations.svg)

Accuracy: greedy, on held-out problems, mean and standard deviation (sd) over the seeds, and the mean difference to
full GRPO on the same seeds, which are not equally hard. Memory: growth of the process's peak. Seconds are the clock's,
with as many runs at a time as `--jobs` says; CPU seconds the processor's. Every method makes one update of each batch,
PPO with 4 epochs makes four. PPO by trl.experimental.ppo is the trainer that TRL had until 1.12, with the same critic
(`recipes/ppo_trl.py`); it draws with transformers, which its seconds and memory are of too. No method's learning rate
was tuned: this is one task, of a 0.9M-parameter model, and says how the methods compare there.
"""
    (docs / "ablations.md").write_text(text, encoding="utf-8")
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has not been run yet, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(UNASKED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--completions", type=int, default=128, help="per step")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/ablations"), help="models and single runs")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of the report")
    parser.add_argument("--report", action="store_true", help="run nothing: the report of the runs that are done")
    parser.add_argument("--smoke", action="store_true", help="untrained models, two small steps, one seed, one process")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    held_out = 400
    if arguments.smoke:
        arguments.seeds, arguments.steps, arguments.completions, held_out = arguments.seeds[:1], 2, 16, 8
        if arguments.docs == parser.get_default("docs"):
            arguments.docs = arguments.output_dir / "docs"  # figures of a smoke run say nothing
    quiet_libraries()
    torch.set_num_threads(1)
    out = arguments.output_dir.resolve()

    def run(method: str, seed: int) -> None:
        """Train by one method, or make the model that all start from (`START`)."""
        place = out / f"{method}-{seed}"
        if (place / "result.json").exists() or arguments.report:
            return
        if arguments.smoke or arguments.one:
            warm = out / f"{START}-{seed}"
            if method == START:
                make_start(warm, seed, arguments.smoke, held_out)
            else:
                run_one(method, seed, warm, place, arguments.steps, arguments.completions, held_out)
        else:  # a process of its own: its memory is the run's
            console.print(f"{method}, seed {seed}")
            options = ["--steps", str(arguments.steps), "--completions", str(arguments.completions)]
            command = [sys.executable, __file__, "--output-dir", str(out), *options, "--one", method, str(seed)]
            with (out / f"{method}-{seed}.log").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)

    def start(seed: int) -> float:
        """The accuracy of the model that all methods start from, which is made on first use."""
        run(START, seed)
        file = out / f"{START}-{seed}" / "result.json"
        if not file.exists():
            parser.error(f"--report: there is no run of seed {seed} in {out}")
        return float(json.loads(file.read_text(encoding="utf-8"))["accuracy"])

    if arguments.one:
        run(arguments.one[0], int(arguments.one[1]))
        return
    out.mkdir(parents=True, exist_ok=True)
    work = [(method, seed) for method in arguments.methods for seed in arguments.seeds]
    with ThreadPoolExecutor(1 if arguments.smoke else arguments.jobs) as pool:
        before = dict(zip(arguments.seeds, pool.map(start, arguments.seeds), strict=True))
        # The longest first, so that none is left over at the end
        list(pool.map(lambda one: run(*one), sorted(work, key=lambda one: not one[0].startswith("ppo"))))
    # What was run earlier is reported too: a table of some methods would overwrite that of all
    files = [out / f"{method}-{seed}" / "result.json" for seed in arguments.seeds for method in METHODS]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    if not results:
        parser.error(f"--report: there is no run in {out}")
    how = " --smoke" if arguments.smoke else f" --jobs {arguments.jobs}"
    named = [method for method in METHODS if method not in UNASKED and any(r["method"] == method for r in results)]
    commands = [f"python recipes/ablations.py{how}"]
    commands += [f"{commands[0]} --methods {' '.join(named)}"] * bool(named)
    console.print(write_report(results, before, arguments.docs, commands))
    console.print(f"written: {arguments.docs / 'ablations.md'}")


if __name__ == "__main__":
    main()
