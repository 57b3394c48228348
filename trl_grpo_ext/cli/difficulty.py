"""`trl-grpo difficulty`: the pass rate of every prompt under a model, as a column; prompts outside a band filtered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .main import OK, CheckFailed, as_refusals
from .model_options import ModelOptions, check_writable
from .parser import CommandParser
from .prompt_options import FilteredPrompts

if TYPE_CHECKING:
    from datasets import Dataset

_DESCRIPTION = """\
Sample completions of every prompt, and write the prompts with the share of completions that pass: the columns
pass_rate, pass_count and samples. A run that was interrupted goes on where it was."""


@dataclass
class DifficultyDraws:
    """How completions are drawn and judged."""

    _argument_group_name: ClassVar[str] = "sampling"

    samples: int = field(default=8, metadata={"help": "completions per prompt"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest completion"})
    temperature: float = field(default=1.0, metadata={"help": "as in the training that is to follow"})
    top_p: float = field(default=1.0, metadata={"help": "keep the likeliest tokens of so much probability"})
    top_k: int = field(default=0, metadata={"help": "keep so many of the likeliest tokens; 0 keeps all"})
    seed: int = field(default=0, metadata={"help": "of the random numbers"})
    batch_size: int = field(default=64, metadata={"help": "completions at a time; changes speed, not results"})
    reward: str = field(
        default="accuracy", metadata={"help": "reward by which a completion passes, where it is 1.0", "metavar": "NAME"}
    )
    reward_workers: int | None = field(default=None, metadata={"help": "processes that rewards run in; 0: this one"})


@dataclass
class DifficultyOutput:
    """Where the prompts go."""

    _argument_group_name: ClassVar[str] = "output"

    output: str | None = field(default=None, metadata={"help": "file to write, .jsonl or .parquet", "metavar": "FILE"})
    overwrite: bool = field(default=False, metadata={"help": "replace an output that is there"})
    min_pass_rate: float = field(default=0.0, metadata={"help": "prompts below it are not in the filtered file"})
    max_pass_rate: float = field(default=1.0, metadata={"help": "nor are those above it"})
    filtered: str | None = field(
        default=None,
        metadata={"help": "file for the prompts in that band; by default OUTPUT with '-filtered'", "metavar": "FILE"},
    )


def run(argv: Sequence[str]) -> int:
    """Measure, write, print, and return the exit code."""
    groups = [ModelOptions, FilteredPrompts, DifficultyDraws, DifficultyOutput]
    who, what, how, to = CommandParser("difficulty", _DESCRIPTION, groups).read(argv)
    what.arguments()  # without a dataset refused, before anything else
    if who.which == "both":
        raise ValueError("--which both cannot be measured at once: choose base or adapter")
    if who.which is not None:
        who.speakers()  # an adapter that is not there is refused
    output, filtered = _files(to)

    from ..adapter_source import read_adapter
    from ..difficulty import Measurement, in_band, measure_pass_rates, write
    from ..rewards import Limits, RewardError, load_rewards
    from ..rollout import SamplingParams

    params = SamplingParams(how.max_new_tokens, how.temperature, how.top_p, how.top_k)
    measurement = Measurement(how.samples, params, how.seed, how.batch_size)
    limits = Limits(workers=how.reward_workers)
    with as_refusals():
        (reward,), _ = load_rewards([how.reward])
    if who.which == "base" and who.adapter is not None:
        source = read_adapter(who.adapter, who.model, who.revision)
        who.model, who.revision, who.adapter = source.base, source.base_revision, None
    policy = who.load()
    prompts, partial = _prompts(what, policy.tokenizer), output.with_name(f"{output.name}.partial")
    try:
        rows = measure_pass_rates(policy, prompts, measurement, reward=reward, partial=partial, limits=limits)
    except (KeyboardInterrupt, RewardError) as stop:
        why = "interrupted" if isinstance(stop, KeyboardInterrupt) else str(stop)
        raise CheckFailed(f"{why}; rows that were done are in {partial}, and the same command goes on there") from stop
    write(rows, output)
    partial.unlink()
    kept = None if filtered is None else in_band(rows, to.min_pass_rate, to.max_pass_rate)
    _show(rows, how.samples, output)
    if kept is not None and filtered is not None:
        band = f"[{to.min_pass_rate:g}, {to.max_pass_rate:g}]"
        if not len(kept):
            rates = [rate for rate in rows["pass_rate"][:] if rate is not None]
            found = f"they are {min(rates):g} to {max(rates):g}" if rates else "none could be judged"
            raise CheckFailed(
                f"no prompt has a pass rate in {band}, of {len(rows)} in {output} ({found}). Nothing need be measured "
                "again: choose another band where they are read, pass_rate: [LOW, HIGH]"
            )
        write(kept, filtered)
        print(f"{len(kept)} of {len(rows)} prompts have a pass rate in {band}: {filtered}")
    return OK


def _files(to: DifficultyOutput) -> tuple[Path, Path | None]:
    """The output, and the filtered file if there is a band; refused before any work."""
    low, high = to.min_pass_rate, to.max_pass_rate
    if not 0 <= low <= high <= 1:
        raise ValueError(f"min_pass_rate={low} and max_pass_rate={high} must be a band in [0, 1]: the lower one first")
    if to.output is None:
        raise ValueError("output is missing: say where the prompts go, --output FILE.jsonl or FILE.parquet")
    output = Path(to.output)
    filtered = None
    if to.filtered is not None:
        filtered = Path(to.filtered)
    elif (low, high) != (0.0, 1.0):
        filtered = output.with_name(f"{output.stem}-filtered{output.suffix}")
    for option, path in (("--output", output), ("--filtered", filtered)):
        if path is None:
            continue
        if path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"{option} {str(path)!r} must end in .jsonl or .parquet: it says how rows are written")
        check_writable(option, path)
        if path.exists() and not to.overwrite:
            raise ValueError(f"{option} {str(path)!r} is there already: give another name, or --overwrite")
    if output == filtered:
        raise ValueError(f"--output and --filtered are the same file, {str(output)!r}: give two names")
    return output, filtered


def _prompts(what: FilteredPrompts, tokenizer: Any) -> Dataset:
    from datasets import Dataset

    from ..data import PromptReport, load_prompts

    report = PromptReport()
    rows = load_prompts(**what.arguments(), tokenizer=tokenizer, report=report)
    assert isinstance(rows, Dataset)  # as nothing is streamed
    print(report)
    return rows


def _show(rows: Dataset, samples: int, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..difficulty import histogram

    rates = rows["pass_rate"][:]
    table = Table("pass rate", "prompts", "", title=f"{len(rates)} prompts by pass rate")
    bars = histogram(rates)
    most = max(count for _, count in bars)
    for label, count in bars:
        table.add_row(label, str(count), "█" * round(40 * count / most))
    Console().print(table)
    without = samples * len(rows) - sum(rows["samples"][:])
    if without:
        print(f"{without} of {samples * len(rows)} completions were not judged: the reward gave no number")
    judged = [rate for rate in rates if rate is not None]
    passed = f"mean pass rate {sum(judged) / len(judged):.1%}; " if judged else ""
    print(f"{passed}{sum(0 < rate < 1 for rate in judged)} prompts have both kinds of completions: {output}")
