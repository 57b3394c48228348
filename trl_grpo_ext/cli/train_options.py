"""The options of `trl-grpo train` beside those of `GRPOConfig`, a dataclass per group of `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass
class TrainModel:
    """What is trained."""

    _argument_group_name: ClassVar[str] = "model"

    model: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the base; with adapter_name_or_path by default the adapter's"},
    )
    revision: str | None = field(default=None, metadata={"help": "revision of the base on the Hub"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "of the base's weights; auto: as stored; by default float32, as in TRL"}
    )
    quantize: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "nf4, fp4 or int8: quantize the base while loading it; or bitsandbytes' settings as a mapping"
        },
    )


@dataclass
class TrainAdapter:
    """What is put on it."""

    _argument_group_name: ClassVar[str] = "adapter"

    adapter: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "lora; none: every weight is trained; or a PEFT config as a mapping with its peft_type. By default "
            "lora, and nothing new with adapter_name_or_path"
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": "rank (by default 16)"})
    lora_alpha: int | None = field(default=None, metadata={"help": "output is scaled by alpha / r (by default 32)"})
    lora_dropout: float | None = field(default=None, metadata={"help": "dropout of its input (by default 0)"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "modules that get one (by default all-linear: all but the LM head)"}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained in full beside it, and saved with it"}
    )
    use_rslora: bool | None = field(default=None, metadata={"help": "scale by alpha / sqrt(r) (arXiv:2312.03732)"})
    use_dora: bool | None = field(default=None, metadata={"help": "DoRA (arXiv:2402.09353)"})
    lora: dict[str, Any] | None = field(
        default=None, metadata={"help": "further fields of peft.LoraConfig; the options above win"}
    )


@dataclass
class TrainPrompts:
    """What is completed: the arguments of `load_prompts`."""

    _argument_group_name: ClassVar[str] = "prompts"

    dataset: dict[str, float] | list[str] | str | None = field(
        default=None, metadata={"help": "source(s), by name, Hub id or file; a mapping {source: weight} is a mixture"}
    )
    dataset_split: str = field(default="train", metadata={"help": "split to train on"})
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
    dataset_shuffle: bool = field(default=False, metadata={"help": "shuffle before skip and take"})
    dataset_seed: int = field(default=0, metadata={"help": "of that shuffle, of mixtures, and of procedural sources"})
    dataset_skip: int = field(default=0, metadata={"help": "rows to leave out at the start"})
    dataset_take: int | None = field(default=None, metadata={"help": "rows to take, at most"})
    dataset_streaming: bool = field(default=False, metadata={"help": "read rows as they are needed"})
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = field(
        default="first_exhausted", metadata={"help": "when a mixture ends"}
    )
    eval_dataset: dict[str, Any] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "held-out source(s), read as the training ones are; or a mapping with a source and whatever is "
            "different: {source: gsm8k, template: ...}"
        },
    )
    eval_split: str = field(default="test", metadata={"help": "split to evaluate on"})
    eval_take: int | None = field(default=None, metadata={"help": "rows to evaluate on, at most"})


@dataclass
class TrainRewards:
    """What a completion is worth."""

    _argument_group_name: ClassVar[str] = "rewards"

    rewards: list[dict[str, Any] | str] | None = field(
        default=None,
        metadata={
            "help": "names with weights, accuracy:1.0 format:0.5 (docs/rewards.md); with options as mappings: "
            "{name: length, weight: 0.3, max_chars: 4000}"
        },
    )


@dataclass
class TrainRun:
    """Whether it is really meant."""

    _argument_group_name: ClassVar[str] = "dry run"

    dry_run: bool = field(
        default=False, metadata={"help": "show prompts, lengths, rewards, memory and steps; load no weights"}
    )
    dry_run_prompts: int = field(default=2, metadata={"help": "prompts to show"})
