"""`trl-grpo eval`: how good base and adapter are on held-out prompts, and whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .eval_prompts import EvalPrompts
from .main import OK, CheckFailed, as_refusals
from .model_options import ModelOptions, check_writable
from .parser import CommandParser, Gather

if TYPE_CHECKING:
    from ..side_by_side import LoadedPolicy

_DESCRIPTION = """\
Sample completions of held-out prompts by the base, by base + adapter, or by both with the same random numbers, and
report pass@k, maj@k, format, length and truncation with confidence intervals, and a paired test of the difference."""


@dataclass
class EvalDraws:
    """How completions are drawn."""

    _argument_group_name: ClassVar[str] = "sampling"

    num_generations: int = field(default=4, metadata={"help": "completions per prompt, by each of the two"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest completion"})
    temperature: float = field(
        default=1.0, metadata={"help": "0 takes the most likely token, with --num-generations 1"}
    )
    top_p: float = field(default=1.0, metadata={"help": "keep the likeliest tokens of so much probability"})
    top_k: int = field(default=0, metadata={"help": "keep so many of the likeliest tokens; 0 keeps all"})
    seed: int = field(default=0, metadata={"help": "of the random numbers, the same for base and adapter"})
    batch_size: int = field(default=64, metadata={"help": "completions at a time; changes speed, not results"})


@dataclass
class EvalJudges:
    """How completions are judged and counted."""

    _argument_group_name: ClassVar[str] = "judging"

    k: list[int] | None = field(
        default=None,
        metadata={"help": "for pass@k and maj@k; by default 1 and num_generations", "action": Gather, "metavar": "K"},
    )
    reward: str = field(
        default="accuracy",
        metadata={"help": "reward by which a completion is right, where it is 1.0: a name or FILE.py:NAME"},
    )
    format_reward: str = field(
        default="think_answer_format",
        metadata={"help": "reward by which the format is kept, where it is 1.0; none: not asked", "metavar": "NAME"},
    )
    breakdown: list[str] | None = field(
        default=None,
        metadata={
            "help": "columns to break the results down by; by default level, subject and source, where there are such",
            "action": Gather,
            "metavar": "COLUMN",
        },
    )
    confidence: float = field(default=0.95, metadata={"help": "of the intervals"})
    resamples: int = field(default=10_000, metadata={"help": "bootstrap samples, and permutations of the paired test"})
    reward_workers: int | None = field(default=None, metadata={"help": "processes that rewards run in; 0: this one"})
    reward_timeout: float = field(default=10.0, metadata={"help": "seconds that the reward of a completion may take"})


@dataclass
class EvalOutput:
    """Where the results go."""

    _argument_group_name: ClassVar[str] = "output"

    output: str | None = field(
        default=None,
        metadata={"help": "folder for evaluation.json and completions.parquet, as well", "metavar": "DIR"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an evaluation that is there"})

    def check(self) -> None:
        """Refuse a folder that cannot be written, or whose evaluation would be lost, before hours of sampling.

        Raises:
            ValueError: names the folder, what is in the way, and the remedy.
        """
        if self.output is None:
            return
        from ..evaluation.report import COMPLETIONS_FILE, SUMMARY_FILE

        check_writable("--output", self.output, folder=True)
        for name in (SUMMARY_FILE, COMPLETIONS_FILE):
            file = Path(self.output) / name
            if file.exists() and not self.overwrite:
                raise ValueError(f"--output {self.output!r} has {name} already: give another folder, or --overwrite")
            check_writable("--output", file)


def run(argv: Sequence[str]) -> int:
    """Evaluate, print, write, and return the exit code."""
    groups = [ModelOptions, EvalPrompts, EvalDraws, EvalJudges, EvalOutput]
    who, what, how, judges, to = CommandParser("eval", _DESCRIPTION, groups).read(argv)
    which = who.speakers()
    to.check()

    from ..evaluation import Settings, evaluate_policy
    from ..evaluation.evaluate import BREAKDOWN
    from ..rewards import Limits, RewardError, load_rewards

    with as_refusals():
        (reward,), _ = load_rewards([judges.reward])
        (format_reward,), _ = load_rewards([judges.format_reward]) if judges.format_reward != "none" else ((None,), [])
    own = {**vars(how), "k": tuple(judges.k or ()), "confidence": judges.confidence, "resamples": judges.resamples}
    Settings(**own)  # what cannot be is said before a model is loaded
    limits = Limits(timeout=judges.reward_timeout, workers=judges.reward_workers)
    loaded: list[LoadedPolicy] = []

    def policy() -> LoadedPolicy:
        if not loaded:
            loaded.append(who.load())
        return loaded[0]

    rows = what.read(lambda: policy().tokenizer)
    missing = [name for name in judges.breakdown or () if name not in rows.column_names]
    if missing:
        raise ValueError(f"--breakdown {missing[0]} is no column of the prompts (they have {rows.column_names})")
    partial = None if to.output is None else Path(to.output) / "completions.partial.jsonl"
    try:
        found = evaluate_policy(
            policy(),
            rows,
            name=f"--dataset {' '.join(what.sources())}",
            which=which,
            reward=reward,
            format_reward=format_reward,
            breakdown=judges.breakdown or BREAKDOWN,
            reward_limits=limits,
            failures_file=None if to.output is None else Path(to.output) / "reward_failures.jsonl",
            partial=partial,
            **own,
        )
    except (KeyboardInterrupt, RewardError) as stop:
        why = "interrupted" if isinstance(stop, KeyboardInterrupt) else str(stop)
        on = "" if partial is None else f"; what was drawn is in {partial}, and the same command goes on there"
        raise CheckFailed(why + on) from stop
    found.summary["data"] |= {"sources": what.sources(), "split": what.dataset_split, "config": what.dataset_config}
    found.print()
    if to.output is not None:
        print(f"Written to {found.save(to.output)}")
    if partial is not None:
        partial.unlink()
    return OK
