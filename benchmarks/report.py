"""From runs to what is read: medians, the terminal's table, RESULTS.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

from curriculum_report import curriculum_section
from firewall_report import firewall_section
from prompts_report import prompts_section
from rewards_report import rewards_section
from rich.console import Console
from rich.table import Table
from workload import SHAPES

REWARD_PACKAGES = ("math-verify", "sympy", "trl")
ROWS = (  # key of the medians, label, format
    ("seconds_per_step", "seconds per step", "{:.2f}"),
    ("rollout_seconds", "of these, rollouts", "{:.2f}"),
    ("update_seconds", "of these, the rest", "{:.2f}"),
    ("rollout_tokens_per_second", "rollout tokens/s", "{:.0f}"),
    ("update_tokens_per_second", "update tokens/s", "{:.0f}"),
    ("step_tokens_per_second", "step tokens/s", "{:.0f}"),
    ("memory_growth_gib", "growth of peak memory, GiB", "{:.2f}"),
    ("completions_per_step", "completions per step", "{:.0f}"),
    ("mean_completion_length", "mean completion length", "{:.1f}"),
)


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """What a report says of where it was measured; call it before the load begins."""
    return {
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the runs of one side; a run's value is the mean of its measured steps."""

    def per_run(name: str) -> list[float]:
        return [mean(step[name] for step in run["steps"]) for run in runs]

    def rate(name: str) -> float:
        return median(t / s for t, s in zip(per_run("completion_tokens"), per_run(name), strict=True))

    return {
        "seconds_per_step": median(per_run("seconds")),
        "rollout_seconds": median(per_run("rollout_seconds")),
        "update_seconds": median(per_run("update_seconds")),
        "rollout_tokens_per_second": rate("rollout_seconds"),
        "update_tokens_per_second": rate("update_seconds"),
        "step_tokens_per_second": rate("seconds"),
        "memory_growth_gib": median(run["memory_growth_bytes"] for run in runs) / 2**30,
        "completions_per_step": median(per_run("completions")),
        "mean_completion_length": sum(per_run("completion_tokens")) / sum(per_run("completions")),
    }


def table_header(result: dict[str, Any]) -> list[str]:
    sides = list(result["medians"])
    return ["", *sides, *(["ours / trl", "target"] if len(sides) == 2 else [])]


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """Label, one column per side and, if both ran, their ratio and its target."""
    sides = result["medians"]
    rows = []
    for key, label, layout in ROWS:
        row = [label, *(layout.format(values[key]) for values in sides.values())]
        if len(sides) == 2:
            target = result["targets"].get(key)
            row += [f"{sides['ours'][key] / sides['trl'][key]:.3f}", f"<= {target:.2f}" if target else ""]
        rows.append(row)
    return rows


def print_table(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['shape']}: {result['load']}")
    for number, name in enumerate(table_header(result)):
        table.add_column(name, justify="right" if number else "left")
    for row in table_rows(result):
        table.add_row(*row)
    Console().print(table)


def write_results(result: dict[str, Any], folder: Path) -> None:
    """Keep one shape's result, then write RESULTS.md: a shape can be measured again alone."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results" / f"{result['shape']}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_markdown(folder)


def write_markdown(folder: Path) -> None:
    """RESULTS.md from all results that are kept."""
    files = [folder / "results" / f"{name}.json" for name in sorted(SHAPES)]
    kept = [json.loads(path.read_text()) for path in files if path.exists()]
    text = [
        "# Results",
        "",
        "Written by `benchmarks/step.py` and `benchmarks/firewall.py` (medians over the runs), "
        "`benchmarks/rewards.py`, `benchmarks/prompts.py` and `benchmarks/curriculum.py`; `README.md` says what is "
        "measured and how.",
        *(line for one in kept for line in markdown_section(one)),
        *rewards_section(folder / "results" / "rewards.json"),
        *firewall_section(folder / "results" / "firewall.json"),
        *prompts_section(folder / "results" / "prompts.json"),
        *curriculum_section(folder / "results"),
    ]
    (folder / "RESULTS.md").write_text("\n".join(text) + "\n")


def markdown_section(result: dict[str, Any]) -> list[str]:
    machine, header = result["machine"], table_header(result)
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return [
        "",
        f"## {result['shape']}",
        "",
        f"{result['load']}.",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in table_rows(result)),
        "",
        f"{result['date']}: {machine['device']}, {machine['threads']} of {machine['cores']} cores used, load average "
        f"{machine['load_average_before']} before the start, {machine['system']}, Python {machine['python']}, "
        f"{packages}. {result['runs_per_side']} alternating runs per side, each of {result['warmup_steps']} warm-up "
        f"and {result['steps_per_run']} measured steps. Memory: {result['memory_method']}.",
    ]
