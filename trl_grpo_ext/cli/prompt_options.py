"""What is completed: the arguments of `load_prompts`, as options of every command that reads prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

# Option -> argument of load_prompts, where they are not called the same
_ARGUMENTS = {
    "dataset": "source",
    "dataset_split": "split",
    "dataset_config": "config",
    "dataset_shuffle": "shuffle",
    "dataset_seed": "seed",
    "dataset_skip": "skip",
    "dataset_take": "take",
    "dataset_streaming": "streaming",
}


@dataclass
class PromptOptions:
    """Sources, templates and filters."""

    _argument_group_name: ClassVar[str] = "prompts"

    dataset: dict[str, float] | list[str] | str | None = field(
        default=None, metadata={"help": "source(s), by name, Hub id or file; a mapping {source: weight} is a mixture"}
    )
    dataset_split: str = field(default="train", metadata={"help": "split to read"})
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a dataset on the Hub; options of a procedural one: rows=5000"}
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={"help": "columns of a source of one's own, and more to keep: {problem: ..., answer: ..., NAME: ...}"},
    )
    answer: str | None = field(
        default=None, metadata={"help": "how gold answers are written: gsm8k (after ####), boxed, number, text, raw"}
    )
    unreadable: Literal["error", "drop"] = field(
        default="error", metadata={"help": "rows without a problem or a gold answer are an error, or dropped, counted"}
    )
    template: dict[str, str] | str = field(
        default="r1",
        metadata={
            "help": "r1, r1-zero, qwen-boxed, plain; of one's own: Jinja of a text, a .jinja file, or a mapping of "
            "system, user and assistant",
            "metavar": "NAME|JINJA|JSON",
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "instead of the template's", "metavar": "TEXT"})
    few_shot: list[dict[str, str]] | str | None = field(
        default=None, metadata={"help": "examples shown before each problem: a JSON Lines file, or the rows"}
    )
    overrides: dict[str, Any] | None = field(
        default=None, metadata={"help": "per source, any of these: {source: {template: ..., take: ...}}"}
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "longer prompts are dropped, and counted; never cut"}
    )
    deduplicate: Literal["normalized", "exact", "off"] = field(
        default="normalized", metadata={"help": "how alike two problems must be for the second one to be dropped"}
    )
    dataset_shuffle: bool = field(default=False, metadata={"help": "shuffle before skip and take"})
    dataset_seed: int = field(default=0, metadata={"help": "of that shuffle, of mixtures, and of procedural sources"})
    dataset_skip: int = field(default=0, metadata={"help": "rows to leave out at the start"})
    dataset_take: int | None = field(default=None, metadata={"help": "rows to take, at most"})
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = field(
        default="first_exhausted", metadata={"help": "when a mixture ends"}
    )

    def arguments(self) -> dict[str, Any]:
        """The arguments of `load_prompts`, `source` included, but for what the caller has: tokenizer and report.

        Raises:
            ValueError: without a dataset.
        """
        if not self.dataset:
            raise ValueError(
                "dataset is missing: say where the prompts come from, --dataset NAME, or dataset: in the YAML file"
            )
        names = [f.name for f in fields(self) if not f.name.startswith("eval_")]
        return {_ARGUMENTS.get(name, name): getattr(self, name) for name in names}


@dataclass
class FilteredPrompts(PromptOptions):
    """With what must not, or need not, be trained on left out."""

    decontaminate: list[str] | None = field(
        default=None, metadata={"help": "sources whose problems must not be trained on"}
    )
    decontaminate_ngram: int = field(default=13, metadata={"help": "words of the n-grams that are compared"})
    decontaminate_share: float = field(
        default=0.5, metadata={"help": "part of an evaluation problem's n-grams that a problem may not share"}
    )
    pass_rate: list[float] | None = field(
        default=None, metadata={"help": "LOW HIGH: keep rows whose column pass_rate is within"}
    )

    def arguments(self) -> dict[str, Any]:
        """As above, with these.

        Raises:
            ValueError: without a dataset, or with a band of pass rates that is no pair.
        """
        found = super().arguments()
        band = self.pass_rate
        if band is not None and len(band) != 2:
            raise ValueError(f"pass_rate={band} must be two numbers, the lowest and the highest rate to keep")
        return found | {
            "decontaminate": tuple(self.decontaminate or ()),
            "pass_rate": None if band is None else (band[0], band[1]),
        }


@dataclass
class TrainPrompts(FilteredPrompts):
    """Of training, and those that it is evaluated on."""

    dataset_streaming: bool = field(default=False, metadata={"help": "read rows as they are needed"})
    eval_dataset: dict[str, Any] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "held-out source(s), read as the training ones are; or a mapping with a source and whatever is "
            "different: {source: gsm8k, template: ...}"
        },
    )
    eval_split: str = field(default="test", metadata={"help": "split to evaluate on"})
    eval_take: int | None = field(default=None, metadata={"help": "rows to evaluate on, at most"})
