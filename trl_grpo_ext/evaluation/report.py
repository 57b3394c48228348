"""An evaluation's results: JSON, a table, and every completion in Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from rich.table import Table

SUMMARY_FILE = "evaluation.json"
COMPLETIONS_FILE = "completions.parquet"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_policy` found.

    Attributes:
        summary: What `evaluation.json` holds: `model`, `adapter`, `data`, `settings`, `prompts`, `counts`, `results`
            (`{"base" | "adapter": {metric: {mean, low, high, prompts}}, "difference": {metric: {..., p_value}}}`) and
            `by` (the same for each value of a column).
        completions: A row per completion: see `Judged` for the columns, and the dataset's own.
    """

    summary: dict[str, Any]
    completions: Dataset

    def mean(self, metric: str, who: str | None = None) -> float:
        """The mean of "pass@1", say; of the adapter if there is one, else of the base.

        Raises:
            KeyError: there is no such metric.
        """
        results = self.summary["results"]
        found: float = results[who or ("adapter" if "adapter" in results else "base")][metric]["mean"]
        return found

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `evaluation.json` and `completions.parquet` into a folder, which is made if need be."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self.completions.to_parquet(place / COMPLETIONS_FILE)
        text = json.dumps(self.summary, indent=2, ensure_ascii=False, allow_nan=False)
        (place / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
        return place

    def tables(self) -> list[Table]:
        """The results as rich tables: all prompts first, then a table per column of the breakdown."""
        return list(_tables(self.summary))

    def print(self, console: Console | None = None) -> None:
        """Print the tables, and what was not scored."""
        from rich.console import Console

        out = console or Console()
        for table in self.tables():
            out.print(table)
        for line in _remarks(self.summary):
            out.print(line, markup=False)


def load_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `Evaluation.save` wrote: `evaluation.json`, or the folder that it lies in.

    Raises:
        ValueError: there is no such file, or it is not one of ours.
    """
    file = Path(path)
    file = file / SUMMARY_FILE if file.is_dir() else file
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the evaluation {str(file)!r} cannot be read: {error}. Write one by trl-grpo eval."
        ) from error
    if not isinstance(summary, dict) or not isinstance(summary.get("results"), dict) or "settings" not in summary:
        raise ValueError(f"{str(file)!r} is not an evaluation: it has no 'results'. Write one by trl-grpo eval.")
    if summary.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{str(file)!r} has format_version={summary.get('format_version')!r}, and {FORMAT_VERSION} is what can be "
            "read: evaluate again."
        )
    return summary


def _tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    from rich.table import Table
    from rich.text import Text

    settings, results = summary["settings"], summary["results"]
    title = f"{summary['prompts']} prompts, {settings['num_generations']} completions each"
    percent = f"{100 * settings['confidence']:g} %"
    table = Table(title=title, caption=f"In brackets: {percent} confidence intervals over prompts.")
    table.add_column("metric")
    for who in results:
        table.add_column("adapter - base" if who == "difference" else who, justify="right")
    if "difference" in results:
        table.add_column("p", justify="right")
    for metric in next(iter(results.values())):
        cells = [_cell(found.get(metric), metric, who == "difference") for who, found in results.items()]
        if "difference" in results:
            cells.append(_p_value(results["difference"].get(metric)))
        table.add_row(metric, *cells)
    yield table
    solved = [name for name in next(iter(results.values())) if name.startswith("pass@")]
    shown = list(dict.fromkeys((solved[0], solved[-1]))) if solved else []  # the rest is in the JSON
    for column, kinds in summary["by"].items():
        table = Table(title=Text(f"by {column}"))
        for heading in (
            column,
            "prompts",
            "metric",
            *("adapter - base" if who == "difference" else who for who in results),
        ):
            table.add_column(Text(heading), justify="left" if heading in (column, "metric") else "right")
        for kind, found in kinds.items():
            for metric in shown:
                cells = [_cell(found[who].get(metric), metric, who == "difference") for who in results]
                start = (Text(kind), str(found["prompts"])) if metric == shown[0] else (Text(""), "")
                table.add_row(*start, metric, *cells)
        yield table


def _remarks(summary: Mapping[str, Any]) -> Iterator[str]:
    for who, counts in summary["counts"].items():
        if counts["without_reward"]:
            yield (
                f"{who}: {counts['without_reward']} of {counts['completions']} completions have no reward "
                f"({counts['reward_failed']} because it failed on them) and count in no pass@k."
            )
        if counts["comparisons_failed"]:
            yield (
                f"{who}: {counts['comparisons_failed']} comparisons of two answers failed, which count as different in "
                "maj@k."
            )


def _cell(found: Mapping[str, Any] | None, metric: str, signed: bool) -> str:
    if found is None:
        return "-"
    scale, digits, unit = (1.0, 1, "") if metric == "mean_length" else (100.0, 1, "%")

    def show(value: float) -> str:
        return f"{value * scale:{'+' if signed else ''}.{digits}f}"

    text = f"{show(found['mean'])}{unit}"
    if found["low"] is None:
        return text
    # In one word, so that a narrow table breaks before it; escaped, for rich takes brackets for markup
    return f"{text} \\[{show(found['low'])}..{show(found['high'])}]"


def _p_value(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['p_value']:.3f}" if found["p_value"] >= 0.001 else "<0.001"
