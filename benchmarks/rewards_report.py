"""Agreement of accuracy rewards with labels, as read: the terminal's tables and a section of RESULTS.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {
    "agreement": "agreement with the labels",
    "wrong but paid": "rows labelled wrong that earn a reward all the same",
    "speed": "completions per second",
}


def total(files: dict[str, Any]) -> dict[str, Any]:
    """All files as one."""
    entries = list(files.values())
    return {
        "rows": sum(entry["rows"] for entry in entries),
        "left_out": sum(entry["left_out"] for entry in entries),
        "judges": {
            judge: {key: sum(entry["judges"][judge][key] for entry in entries) for key in values}
            for judge, values in entries[0]["judges"].items()
        },
    }


def header(report: dict[str, Any]) -> list[str]:
    first = next(iter(report["files"].values()))
    return ["file", "rows", *first["judges"]]


def rows_of(report: dict[str, Any], kind: str) -> list[list[str]]:
    """One row per file and one for all of them; `kind` is one of `TITLES`."""
    entries = {**report["files"], "over all": total(report["files"])}
    return [
        [name, f"{entry['rows']:,}", *(_cell(judge, entry["rows"], kind) for judge in entry["judges"].values())]
        for name, entry in entries.items()
    ]


def _cell(judge: dict[str, Any], rows: int, kind: str) -> str:
    if kind == "agreement":
        return f"{judge['agrees']:,} ({judge['agrees'] / rows:.2%})"
    return f"{judge['wrong_but_paid']}" if kind == "wrong but paid" else f"{rows / judge['seconds']:,.0f}"


def print_tables(report: dict[str, Any]) -> None:
    for kind, title in TITLES.items():
        table = Table(title=title)
        for number, name in enumerate(header(report)):
            table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
        for row in rows_of(report, kind):
            table.add_row(*row)
        Console().print(table)
    Console().print(f"{total(report['files'])['left_out']} doubtful rows are left out.")


def rewards_section(path: Path) -> list[str]:
    """Lines of Markdown; none without results."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    lines = ["", "## rewards", ""]
    for kind, title in TITLES.items():
        lines += [f"{title[0].upper()}{title[1:]}:", "", "| " + " | ".join(header(report)) + " |"]
        lines += ["|---|" + "---:|" * (len(header(report)) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows_of(report, kind)] + [""]
    left_out = total(report["files"])["left_out"]
    return [
        *lines,
        f"{report['date']}: one call per completion, one process, {left_out} doubtful rows left out; "
        f"{machine['cores']} cores, load average {machine['load_average_before']} before the start, "
        f"{machine['system']}, Python {machine['python']}, {packages}.",
    ]
