"""`load_prompts` measured, as read: the terminal's table and a section of RESULTS.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADER = ["", "rows", "kept", "seconds", "rows/s", "MiB at a tenth", "MiB at the end", "most MiB"]
GOLD = ["set", "rows", "golds parsed", "worked solutions paid", "rows not paid"]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """One row per way of loading."""
    rows = []
    for mode, one in result.get("modes", {}).items():
        sizes = [size for _, size in one["resident_mib"]]
        tenth = next((size for n, size in one["resident_mib"] if n >= one["rows"] // 10), sizes[-1])
        rows.append(
            [
                mode,
                f"{one['rows']:,}",
                f"{one['kept']:,}",
                f"{one['seconds']:.1f}",
                f"{one['rows'] / one['seconds']:,.0f}",
                f"{tenth:.0f}" if len(sizes) > 1 else "",
                f"{sizes[-1]:.0f}",
                f"{max(sizes):.0f}",
            ]
        )
    return rows


def gold_rows(result: dict[str, Any]) -> list[list[str]]:
    """One row per real set."""
    return [
        [
            one["file"],
            f"{one['rows']:,}",
            f"{one['golds']:,}",
            "none given" if one["worked"] is None else f"{one['worked']:,} ({one['worked'] / one['rows']:.2%})",
            ", ".join(map(str, one["others"])),
        ]
        for one in result.get("gold", [])
    ]


def print_tables(result: dict[str, Any]) -> None:
    for header, rows in ((HEADER, rows_of(result)), (GOLD, gold_rows(result))):
        if rows:
            table = Table(*header)
            for row in rows:
                table.add_row(*row)
            Console().print(table)


def prompts_section(path: Path) -> list[str]:
    """The section of RESULTS.md; nothing where nothing was measured."""
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    text = ["", "## prompts"]
    if rows := rows_of(result):
        machine = result["machine"]
        packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
        busy = " (other processes ran all the while)" if machine["load_average_before"] > 1 else ""
        text += ["", "`load_prompts` on synthetic rows; resident memory above that of the imported libraries.", ""]
        text += _table(HEADER, rows)
        text += [
            "",
            f"{result['date']}: {machine['cores']} cores, load average {machine['load_average_before']} before it"
            f"{busy}, {machine['system']}, Python {machine['python']}, {packages}. Once each.",
        ]
    if rows := gold_rows(result):
        text += [
            "",
            "Real sets (`--gold`): `accuracy_reward` on the sets' own worked solutions.",
            "",
            *_table(GOLD, rows),
        ]
    return text


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
