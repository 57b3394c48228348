"""The quickstart's task with both trainers: held-out accuracy and seconds, from the same warmed-up model.

    python benchmarks/quickstart_task.py                # seeds 0, 1, 2
    python benchmarks/quickstart_task.py --seeds 0

Runs `recipes/quickstart.py --trainer trl` and `--trainer ours` in turn, each in a fresh process, from one warmed-up
model per seed and with the same settings. Prints a table and writes `results/quickstart_task.json`.
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


def run(side: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run of the recipe; its metrics."""
    output = folder / f"{side}_{seed}"
    command = [sys.executable, str(RECIPE), "--trainer", side, "--seed", str(seed)]
    command += ["--output-dir", str(output), "--warm-model", str(folder / f"warm_{seed}")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed on seed {seed}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads((output / "metrics.json").read_text())


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    table = Table(title="quickstart task: GRPO with TRL and with ours")
    for heading in ("seed", "accuracy before", "after: trl", "after: ours", "seconds: trl", "ours", "ours / trl"):
        table.add_column(heading, justify="right")
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            sides = {side: run(side, seed, Path(folder)) for side in ("trl", "ours")}
            trl, ours = sides["trl"], sides["ours"]
            ratios.append(ours["seconds_grpo"] / trl["seconds_grpo"])
            rows.append(sides)
            accuracies = (trl["accuracy_before"], trl["accuracy_after"], ours["accuracy_after"])
            seconds = (trl["seconds_grpo"], ours["seconds_grpo"])
            table.add_row(
                str(seed), *(f"{a:.1%}" for a in accuracies), *(f"{s:.0f}" for s in seconds), f"{ratios[-1]:.2f}"
            )
    console = Console()
    console.print(table)
    console.print(f"median of ours / trl in seconds: {statistics.median(ratios):.2f}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    report = {"machine": platform.platform(), "cores": os.cpu_count(), "runs": rows, "ratios": ratios}
    (arguments.results / "quickstart_task.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
