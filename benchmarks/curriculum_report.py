"""The curriculum against uniform sampling, as read: the terminal's tables and a section of RESULTS.md."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

SIDES = ("uniform", "curriculum")
LEVELS = (0.6, 0.7, 0.8, 0.85)
POINTS = 6  # of the curves, from the start to the end
PRACTICE = {
    "mixed": "Practice: additions, half of two digits without a carry, a quarter with one, a quarter of three digits",
    "quickstart": "Practice: the quickstart's own set",
}


def rollouts_to(level: float, curve: list[dict[str, float]]) -> float | None:
    """Where accuracy first is at `level` and still is at the next evaluation; None: nowhere."""
    for point, following in itertools.pairwise(curve):
        if point["accuracy"] >= level and following["accuracy"] >= level:
            return point["rollouts"]
    return None


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):{form}} ± {stdev(values) if len(values) > 1 else 0:{form}}"


def sides_of(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each side, by seed."""
    return {side: sorted((r for r in runs if r["side"] == side), key=lambda r: r["seed"]) for side in SIDES}


def level_rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """level; per side mean and spread, or how many never came there; by seed."""
    rows = []
    for level in LEVELS:
        reached = {side: [rollouts_to(level, r["curve"]) for r in own] for side, own in sides_of(runs).items()}
        cells = [
            spread([value for value in values if value is not None], ",.0f")
            if None not in values
            else f"{values.count(None)} of {len(values)} never"
            for values in reached.values()
        ]
        seeds = [
            "; ".join("-" if value is None else f"{value:,.0f}" for value in values) for values in reached.values()
        ]
        rows.append([f"{level:.0%}", *cells, *seeds])
    return rows


def accuracy_rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """rollouts; per side mean and spread of the accuracy in percent; difference in points by seed."""
    points = [point["rollouts"] for point in runs[0]["curve"]]
    rows = []
    for at in [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]:
        found = [
            [100 * next(p["accuracy"] for p in r["curve"] if p["rollouts"] == at) for r in own]
            for own in sides_of(runs).values()
        ]
        differences = "; ".join(f"{b - a:+.1f}" for a, b in zip(*found, strict=True))
        rows.append([f"{at:,}", *(spread(values, ".1f") for values in found), differences])
    whole = [
        [100 * mean(point["accuracy"] for point in r["curve"][1:]) for r in own] for own in sides_of(runs).values()
    ]
    differences = "; ".join(f"{b - a:+.1f}" for a, b in zip(*whole, strict=True))
    return [*rows, ["mean of the curve", *(spread(values, ".1f") for values in whole), differences]]


LEVEL_HEADER = ("held-out accuracy", *(f"rollouts: {side}" for side in SIDES), *(f"by seed: {side}" for side in SIDES))
ACCURACY_HEADER = ("rollouts", *(f"accuracy, %: {side}" for side in SIDES), "difference by seed, points")


def notes(runs: list[dict[str, Any]]) -> list[str]:
    """Per side: silent groups, tokens of the update, accuracy by digits at the end."""
    lines = []
    for side, own in sides_of(runs).items():
        digits = {n: mean(r["by_digits"][n] for r in own) for n in ("2", "3")}
        lines.append(
            f"{side}: {mean(r['silent_groups'] for r in own):.0%} of groups without any spread of rewards, "
            f"{mean(r['tokens_per_step'] for r in own):,.0f} tokens in the update of a step; at the end "
            f"{digits['2']:.0%} of two and {digits['3']:.0%} of three digits right"
        )
    return lines


def print_tables(runs: list[dict[str, Any]]) -> None:
    """What RESULTS.md has, on the terminal."""
    console = Console(width=120)
    for header, rows in ((LEVEL_HEADER, level_rows(runs)), (ACCURACY_HEADER, accuracy_rows(runs))):
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in notes(runs):
        console.print(line)


def curriculum_section(results: Path) -> list[str]:
    """Lines of RESULTS.md, of each practice set that there are results of."""
    lines: list[str] = []
    for file in (results / "curriculum.json", results / "curriculum_quickstart.json"):
        if not file.exists():
            continue
        kept = json.loads(file.read_text())
        runs = kept["runs"]
        seeds = sorted({run["seed"] for run in runs})
        lines += [
            "",
            *(["## curriculum", ""] if not lines else []),
            f"{PRACTICE[kept['practice']]}; seeds {seeds}.",
            "",
        ]
        for header, rows in ((LEVEL_HEADER, level_rows(runs)), (ACCURACY_HEADER, accuracy_rows(runs))):
            lines += ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            lines.append("")
        lines += [f"- {line}." for line in notes(runs)]
        lines += ["", f"{kept['date']}: {kept['steps']} steps of 128 completions; {kept['machine']}."]
    return lines
