"""The quickstart's task with both trainers: held-out accuracy and seconds, from the same warmed-up model.

    python benchmarks/quickstart_task.py                # seeds 0, 1, 2; two runs per side and seed
    python benchmarks/quickstart_task.py --seeds 0 --repeats 1

Runs `recipes/quickstart.py --trainer trl` and `--trainer ours` in turn, each in a fresh process, from one warmed-up
model per seed and with the same settings; each repeat draws another adapter, other rollouts, another order. The two
sides draw different completions, so their accuracies differ by chance: by how much, the spread between repeats shows.
Prints a table, means over the repeats, and writes `results/quickstart_task.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "quickstart.py"
SIDES = ("trl", "ours")


def run(side: str, seed: int, repeat: int, folder: Path) -> dict[str, Any]:
    """One run of the recipe; its metrics."""
    output = folder / f"{side}_{seed}_{repeat}"
    command = [sys.executable, str(RECIPE), "--trainer", side, "--seed", str(seed)]
    command += ["--grpo-seed", str(seed + 100 * repeat)]
    command += ["--output-dir", str(output), "--warm-model", str(folder / f"warm_{seed}")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed on seed {seed}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads((output / "metrics.json").read_text())


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over one side's repeats on one seed."""
    names = ("accuracy_before", "accuracy_after", "seconds_grpo")
    return {name: statistics.mean(run[name] for run in runs) for name in names}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for repeat in range(arguments.repeats):
                for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
                    runs.append(run(side, seed, repeat, Path(folder)))
                    last = runs[-1]
                    said = f"{last['accuracy_after']:.1%}, {last['seconds_grpo']:.0f} s"
                    print(f"seed {seed}, repeat {repeat}, {side}: {said}", flush=True)
    table = Table(title=f"quickstart task: GRPO with TRL and with ours, means of {arguments.repeats}")
    for heading in (
        "seed",
        "accuracy before",
        "after: trl",
        "ours",
        "ours - trl",
        "seconds: trl",
        "ours",
        "ours / trl",
    ):
        table.add_column(heading, justify="right")
    summary = []
    for seed in arguments.seeds:
        trl, ours = (summarise([r for r in runs if r["seed"] == seed and r["trainer"] == side]) for side in SIDES)
        ratio = ours["seconds_grpo"] / trl["seconds_grpo"]
        points = 100 * (ours["accuracy_after"] - trl["accuracy_after"])
        summary.append({"seed": seed, "trl": trl, "ours": ours, "ratio": ratio, "points": points})
        accuracies = (trl["accuracy_before"], trl["accuracy_after"], ours["accuracy_after"])
        seconds = (trl["seconds_grpo"], ours["seconds_grpo"])
        cells = [f"{a:.1%}" for a in accuracies] + [f"{points:+.1f}"] + [f"{s:.0f}" for s in seconds]
        table.add_row(str(seed), *cells, f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(f"median of ours / trl in seconds: {statistics.median(s['ratio'] for s in summary):.2f}")
    console.print(f"mean of ours - trl in points: {statistics.mean(s['points'] for s in summary):+.1f}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    report = {"machine": platform.platform(), "cores": os.cpu_count(), "summary": summary, "runs": runs}
    (arguments.results / "quickstart_task.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
