"""A `RunPlan` on the terminal."""

from __future__ import annotations

from statistics import mean, median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..free_memory import gib
from .run_plan import MEASURED_PROMPTS, RunPlan, Shown, bar, histogram

if TYPE_CHECKING:
    from ..memory_estimate import MemoryEstimate


def print_plan(plan: RunPlan, console: Console | None = None) -> None:
    """All of it: model, prompts, lengths, rewards, memory, steps."""
    console = console or Console()
    console.print(_model(plan))
    for number, shown in enumerate(plan.shown):
        console.print(_prompt(number, shown))
    console.print(_lengths(plan))
    console.print(_rewards(plan))
    console.print(_memory(plan.memory))
    console.print(_steps(plan))


def _model(plan: RunPlan) -> Table:
    table = _table("Model")
    memory = plan.memory
    share = memory.trainable_parameters / memory.parameters
    table.add_row("model", f"{plan.model} ({plan.architecture})")
    table.add_row("parameters", f"{memory.parameters - _added(plan):,}, in {plan.dtype}")
    table.add_row("quantization", plan.quantization or "none")
    table.add_row("adapter", plan.adapter)
    table.add_row("trained", f"{memory.trainable_parameters:,} parameters ({share:.2%} of all)")
    table.add_row("output_dir", str(plan.args.output_dir))
    return table


def _added(plan: RunPlan) -> int:
    return 0 if plan.adapter.startswith("none") else plan.memory.trainable_parameters


def _prompt(number: int, shown: Shown) -> Panel:
    # As text, for a prompt may hold what rich would read as markup
    solution = "" if shown.solution is None else f"   solution: {shown.solution[:60]}"
    return Panel(
        Text(shown.text),
        title=Text(f"Prompt {number}, as the model reads it"),
        title_align="left",
        subtitle=Text(f"{shown.tokens} tokens{solution}"),
        subtitle_align="left",
    )


def _lengths(plan: RunPlan) -> Table:
    lengths = plan.lengths
    rows = "a stream" if plan.rows is None else f"{plan.rows:,}"
    measured = "" if len(lengths) < MEASURED_PROMPTS else f", the first {len(lengths):,} measured"
    table = Table(title=f"Tokens per prompt ({rows} prompts{measured})", title_justify="left")
    for name in ("tokens", "prompts"):
        table.add_column(name, justify="right")
    table.add_column("")
    bins = histogram(lengths)
    most = max(count for *_, count in bins)
    for low, high, count in bins:
        table.add_row(f"{low}" if low == high else f"{low}-{high}", f"{count:,}", bar(count, most))
    table.caption = f"mean {mean(lengths):.1f}, median {median(lengths):g}, longest {max(lengths)}"
    return table


def _rewards(plan: RunPlan) -> Table:
    table = Table(title="Rewards", title_justify="left")
    table.add_column("reward")
    table.add_column("weight", justify="right")
    for name, weight in plan.rewards:
        table.add_row(Text(name), f"{weight:g}")
    return table


def _memory(memory: MemoryEstimate) -> Table:
    table = Table(title="Memory (an estimate)", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    for name, size in (
        ("base", memory.base),
        ("trained parameters", memory.trained),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("reference", memory.reference),
        ("rollouts: keys and values", memory.cache),
        ("rollouts: drawing a token", memory.drawing),
        ("update: activations", memory.activations),
        ("update: hidden states of the head", memory.head),
    ):
        table.add_row(name, gib(size))
    table.add_section()
    table.add_row("most at a time", gib(memory.peak))
    return table


def _steps(plan: RunPlan) -> Table:
    table, steps, args = _table("Steps"), plan.steps, plan.args
    table.add_row("a step", f"{steps.prompts_per_step:g} prompts, {steps.completions_per_step:g} completions")
    table.add_row("a completion", f"at most {args.sampling_options()['max_new_tokens']} tokens")
    if steps.per_epoch is not None:
        table.add_row("an epoch", f"{steps.per_epoch:,} steps")
    if steps.unused_rows:
        table.add_row("not in an epoch", f"{steps.unused_rows} rows, which do not fill a generation")
    table.add_row("in all", "until the stream ends" if steps.total is None else f"{steps.total:,} steps")
    if steps.epochs is not None:
        table.add_row("epochs", f"{steps.epochs:.2f}")
    if steps.completions is not None:
        table.add_row("completions", f"{steps.completions:,.0f}")
    for name, rows in plan.eval_rows.items():
        count = "a stream" if rows is None else f"{rows:,} prompts"
        each = args.num_generations_eval or args.num_generations
        table.add_row(f"held out: {name}", f"{count}, {each} completion{'s' * (each > 1)} each")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    return table
