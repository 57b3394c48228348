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
