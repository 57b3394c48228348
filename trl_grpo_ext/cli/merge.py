"""`trl-grpo merge`: an adapter into its base's original weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from .main import OK, CheckFailed
from .parser import CommandParser

if TYPE_CHECKING:
    from ..export import MergeReport

_DESCRIPTION = """\
Merge an adapter into the original 16- or 32-bit weights of its base model. The merged model is loaded again from disk
and its log-probabilities are compared with base + adapter on sample prompts; only then does the output folder appear,
with the tokenizer, chat template, generation config and merge_report.json. A base stored in 4 or 8 bits is refused."""


@dataclass
class MergeWhat:
    """What is merged, and where to."""

    _argument_group_name: ClassVar[str] = "what to merge"

    adapter: str = field(metadata={"help": "folder or Hub id of the adapter", "metavar": "DIR"})
    output: str = field(metadata={"help": "folder to write; must not exist, or be empty", "metavar": "DIR"})
    base: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the base; by default the one adapter_config.json names"},
    )
    base_revision: str | None = field(
        default=None, metadata={"help": "revision of the base on the Hub; by default the one adapter_config.json names"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run modelling code that comes with the base"})


@dataclass
class MergeHow:
    """How it is computed."""

    _argument_group_name: ClassVar[str] = "how to merge"

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "of the merged model; auto: the base's. Weights are merged in float32 anyway"}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, ...; by default the GPU if there is one"}
    )


@dataclass
class MergeCheck:
    """What the result is compared on."""

    _argument_group_name: ClassVar[str] = "check"

    prompts: str | None = field(
        default=None,
        metadata={
            "help": "file of prompts to compare on: text, one per line, or JSON Lines of {'prompt': ...} (.jsonl); by "
            "default a few built-in ones",
            "metavar": "FILE",
        },
    )
    continuation: int = field(
        default=16, metadata={"help": "tokens by which base + adapter continue each prompt, compared too"}
    )
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "largest difference of a log-probability. By default 1e-4 where base and result are float32; else "
            "the mean difference must be below what the adapter itself changes"
        },
    )


def run(argv: Sequence[str]) -> int:
    """Merge, print a table, and return the exit code."""
    what, how, check = CommandParser("merge", _DESCRIPTION, [MergeWhat, MergeHow, MergeCheck]).read(argv)

    from ..data import read_prompts
    from ..export import MergeCheckError, merge_adapter

    try:
        report = merge_adapter(
            what.adapter,
            what.output,
            base=what.base,
            base_revision=what.base_revision,
            dtype=how.dtype,
            prompts=None if check.prompts is None else read_prompts(check.prompts),
            continuation=check.continuation,
            tolerance=check.tolerance,
            device=how.device,
            trust_remote_code=what.trust_remote_code,
        )
    except MergeCheckError as error:
        raise CheckFailed(str(error)) from error
    _print(report, what.output)
    return OK


def _print(report: MergeReport, output: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.peft_type} adapter merged in {report.dtype}")
    table.add_column("log-probabilities against base + adapter")
    for name in ("largest difference", "mean difference", "same likeliest token"):
        table.add_column(name, justify="right")
    for name, row in (("merged model", report.difference), ("base alone", report.adapter_effect)):
        table.add_row(name, f"{row.max:.2e}", f"{row.mean:.2e}", f"{row.same_likeliest:.1%}")
    console = Console()
    console.print(table)
    print(
        f"{report.difference.tokens} tokens of {report.prompts} prompts. Rounding to {report.dtype} undid "
        f"{report.update_lost:.1%} of the update's entries (relative error {report.update_error:.1e})."
    )
    print(f"Written to {output}")
