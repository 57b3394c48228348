"""The firewall's cost as read: the terminal's table and a section of RESULTS.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADER = ("reward", "workers", "direct, /s", "firewall, /s", "ratio", "least, most", "start-up, s")


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """One per reward and number of workers."""
    rows = []
    for entry in report["rows"]:
        rate, ratios = entry["completions_per_second"], entry["ratios"]
        workers = f"{entry['workers']}{', one core' if entry['one_core'] else ''}"
        rows.append(
            [
                entry["reward"],
                workers,
                f"{rate['direct']:,.0f}",
                f"{rate['firewall']:,.0f}",
                f"{entry['ratio']:.2f}",
                f"{min(ratios):.2f}, {max(ratios):.2f}",
                f"{entry['start_up_seconds']:.2f}",
            ]
        )
    return rows


def print_table(report: dict[str, Any]) -> None:
    table = Table(title=_what(report))
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="right" if number > 1 else "left")
    for row in table_rows(report):
        table.add_row(*row)
    Console().print(table)


def firewall_section(path: Path) -> list[str]:
    """Lines of Markdown; none without results."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return [
        "",
        "## firewall",
        "",
        f"{_what(report)}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|---|" + "---:|" * (len(HEADER) - 2),
        *("| " + " | ".join(row) + " |" for row in table_rows(report)),
        "",
        f"{report['date']}: {machine['cores']} cores, load average {machine['load_average_before']} before the start, "
        f"{machine['system']}, Python {machine['python']}, {packages}. Medians of {report['rounds']} alternating "
        "rounds.",
    ]


def _what(report: dict[str, Any]) -> str:
    done = report["completions"]
    return (
        f"{done['count']} different completions of {done['mean_characters']:,} characters on average, {done['source']}"
    )
