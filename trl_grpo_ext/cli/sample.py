"""`trl-grpo sample`: completions of base, adapter, or both side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .main import OK
from .model_options import ModelOptions, check_writable
from .parser import CommandParser, Gather

if TYPE_CHECKING:
    from ..data import Prompt
    from ..side_by_side import LoadedPolicy, PromptSamples

_DESCRIPTION = """\
Generate from a base model, from base + adapter, or from both side by side with the same random numbers, so that
completions differ by the adapter alone."""


@dataclass
class SamplePrompts:
    """What is completed."""

    _argument_group_name: ClassVar[str] = "prompts"

    prompt: list[str] | None = field(
        default=None, metadata={"help": "one or more prompts", "action": Gather, "metavar": "TEXT"}
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "file of prompts: text, one per line, or JSON Lines of {'prompt': text or messages} (.jsonl)",
            "metavar": "FILE",
        },
    )
    chat: bool = field(
        default=True,
        metadata={"help": "write texts as a user's message in the tokenizer's chat template, if it has one"},
    )


@dataclass
class SampleDraws:
    """How completions are drawn."""

    _argument_group_name: ClassVar[str] = "sampling"

    num_generations: int = field(default=1, metadata={"help": "completions per prompt"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest completion"})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token"})
    top_p: float = field(default=1.0, metadata={"help": "keep the likeliest tokens of so much probability"})
    top_k: int = field(default=0, metadata={"help": "keep so many of the likeliest tokens; 0 keeps all"})
    seed: int = field(default=0, metadata={"help": "of the random numbers, the same for base and adapter"})


@dataclass
class SampleOutput:
    """Where the completions go."""

    _argument_group_name: ClassVar[str] = "output"

    json: str | None = field(default=None, metadata={"help": "file to write everything to, as well", "metavar": "FILE"})
    overwrite: bool = field(default=False, metadata={"help": "replace a file that is there"})


def run(argv: Sequence[str]) -> int:
    """Generate, print, and return the exit code."""
    groups = [ModelOptions, SamplePrompts, SampleDraws, SampleOutput]
    who, what, how, output = CommandParser("sample", _DESCRIPTION, groups).read(argv)
    if not what.prompt and what.prompts is None:
        raise ValueError("there is nothing to complete: pass --prompt TEXT or --prompts FILE")
    if how.num_generations < 1:
        raise ValueError(f"num_generations={how.num_generations} must be at least 1")
    if not 0 <= how.seed < 2**64:
        raise ValueError(f"seed={how.seed} must be in 0..2^64-1: it is part of the key of the random numbers")
    which = who.speakers()
    if output.json is not None:
        check_writable("--json", output.json)
        if Path(output.json).exists() and not output.overwrite:
            raise ValueError(f"--json {output.json!r} is there already: give another name, or --overwrite")

    from ..data import numbered_prompts
    from ..rollout import SamplingParams
    from ..side_by_side import sample_side_by_side

    lines = numbered_prompts(what.prompts) if what.prompts else []
    prompts: list[Prompt] = [*(what.prompt or []), *(prompt for _, prompt in lines)]
    origins = [f"--prompt {number}" for number, _ in enumerate(what.prompt or [], 1)]
    origins += [f"--prompts {what.prompts}, line {number}" for number, _ in lines]
    greedy = how.temperature == 0
    params = SamplingParams(
        max_new_tokens=how.max_new_tokens,
        temperature=1.0 if greedy else how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        greedy=greedy,
    )
    policy = who.load()
    found = sample_side_by_side(
        policy,
        prompts,
        which,
        params,
        num_generations=how.num_generations,
        seed=how.seed,
        chat=what.chat,
        origins=origins,
    )
    _print(found)
    if output.json is not None:
        settings: dict[str, Any] = {"dtype": who.dtype, "quantize": who.quantize, **asdict(how)}
        _write(Path(output.json), policy, settings, found)
    return OK


def _print(found: Sequence[PromptSamples]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for row in found:
        prompt = (
            row.prompt
            if isinstance(row.prompt, str)
            else "\n".join(f"{message['role']}: {message.get('content', '')}" for message in row.prompt)
        )
        table = Table(title=Text(prompt), title_justify="left", show_lines=True, expand=True)
        for who in row.samples:
            table.add_column(who, ratio=1)
        for samples in zip(*row.samples.values(), strict=True):
            # As text, for completions may hold what rich would read as markup
            table.add_row(*(Text(f"{s.text}\n({s.tokens} tokens, {s.finish_reason})") for s in samples))
        console.print(table)


def _write(file: Path, policy: LoadedPolicy, settings: dict[str, Any], found: Sequence[PromptSamples]) -> None:
    rows = [
        {"prompt": row.prompt} | {who: [asdict(s) for s in samples] for who, samples in row.samples.items()}
        for row in found
    ]
    result = {"model": policy.base, "adapter": policy.adapter, "settings": settings, "samples": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
