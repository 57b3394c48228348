"""`training_config.yaml`: what a run was made with, to make it again.

    record = load_run_config("training_config.yaml")
    trainer = GRPOTrainer(
        model=record["model"]["id"],
        reward_funcs=...,  # record["rewards"] names them
        args=run_arguments(record, output_dir="again"),
        train_dataset=...,  # record["datasets"] says which, with the fingerprint
        quantization_config=run_quantization(record),
        peft_config=run_adapter(record),
    )

No token is ever in it, nor a path of the machine that trained, nor where the run was pushed to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets import Dataset, IterableDataset
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftType
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.trainer.utils import get_config_model_id

from ..config import GRPOConfig
from ..credentials import known_tokens, without_tokens
from .datasets import describe_dataset

FILE = "training_config.yaml"
PACKAGES = ("trl_grpo_ext", "trl", "transformers", "peft", "torch", "accelerate", "datasets", "bitsandbytes")

# Where a run was, and what it was called: nothing that it computed depends on it
_PLACE = frozenset({"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "local_rank", "disable_tqdm"})
_NOT_OF_THE_ADAPTER = frozenset(
    {"base_model_name_or_path", "inference_mode", "runtime_config", "auto_mapping", "peft_version", "revision"}
)
# Written whatever the default: the one is chosen by the device, the other is asked for first
_ALWAYS = frozenset({"bf16", "seed"})
# What TrainingArguments puts where nothing was set
_FILLED_IN: dict[str, tuple[Any, ...]] = {
    "report_to": ([],),
    "debug": ([],),
    "activation_checkpointing": (True,),
    # TrainingArguments takes use_configured_state out of its own
    "accelerator_config": ({k: v for k, v in AcceleratorConfig().to_dict().items() if k != "use_configured_state"},),
}


def run_config(
    args: GRPOConfig,
    model: PreTrainedModel,
    *,
    peft_config: PeftConfig | None,
    rewards: Mapping[str, float],
    train_dataset: Dataset | IterableDataset | None = None,
    eval_datasets: Mapping[str, Dataset | IterableDataset] | None = None,
    base_fingerprint: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a run: sections `model`, `adapter`, `datasets`, `rewards`, `training` and `versions`.

    Args:
        args: Of which `training` holds the fields that are not at their default.
        model: The base model, of which the id, revision and commit are written; a path only by its last part.
        peft_config: Of which `adapter` holds the fields that are not at their default; None without an adapter.
        rewards: Each reward's name and weight.
        train_dataset, eval_datasets: Of which id, split, number of rows and fingerprint are written.
        base_fingerprint: A hash of the base's weights.
        recipe: Options of `trl-grpo train`, by which it makes the run again; a section of that name.
    """
    tokens = known_tokens(args.hub_token)
    record = {
        "model": _model(args, model) | ({"fingerprint": base_fingerprint} if base_fingerprint else {}),
        "adapter": None if peft_config is None else _adapter(peft_config),
        "datasets": {
            name: describe_dataset(dataset)
            for name, dataset in {"train": train_dataset, **(eval_datasets or {})}.items()
            if dataset is not None
        },
        "rewards": [{"name": name, "weight": weight} for name, weight in rewards.items()],
        "training": _training(args),
        **({} if recipe is None else {"recipe": recipe}),
        "versions": {package: version(package.replace("_", "-")) for package in PACKAGES},
    }
    return cast(dict[str, Any], without_tokens(_plain(record), tokens))


def save_run_config(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `training_config.yaml`."""
    path = folder / FILE
    text = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=120)
    path.write_text(f"# How to make this run again: docs/hub.md of trl_grpo_ext\n{text}", encoding="utf-8")
    return path


def load_run_config(path: str | Path) -> dict[str, Any]:
    """The record in `training_config.yaml`.

    Raises:
        ValueError: if the file is not such a record.
    """
    try:
        record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}): restore it, or remove it") from error
    sections = [record.get(name) for name in ("model", "training")] if isinstance(record, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"{path} has no sections 'model' and 'training': it is no {FILE} of a run. Remove it")
    return cast(dict[str, Any], record)


def run_arguments(record: Mapping[str, Any], **overrides: Any) -> GRPOConfig:
    """The `GRPOConfig` of a recorded run; `overrides` are fields, such as `output_dir`."""
    return GRPOConfig(**{**record["training"], **overrides})


def run_adapter(record: Mapping[str, Any]) -> PeftConfig | None:
    """The PEFT config of a recorded run; None if every weight was trained, or an adapter that there was already."""
    if record.get("adapter") is None or "adapter_name_or_path" in record["training"]:
        return None
    values = dict(record["adapter"])
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(values.pop("peft_type"))]
    return kind(**values)


def run_quantization(record: Mapping[str, Any]) -> BitsAndBytesConfig | None:
    """How the base of a recorded run was quantized; None if it was not, or the config's `model_init_kwargs` say so."""
    quantization = record["model"].get("quantization")
    if quantization is None or "quantization_config" in (record["training"].get("model_init_kwargs") or {}):
        return None
    return cast(BitsAndBytesConfig, BitsAndBytesConfig.from_dict(dict(quantization)))


def public_model_id(model: PreTrainedModel) -> str | None:
    """The base's id on the Hub; None for a model that came from a folder of this machine, or from nowhere."""
    name = get_config_model_id(model.config)
    return name if name and is_hub_id(name) else None


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `owner/model` or `model`, and is no folder here."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part[0] not in ".~" for part in parts) and not Path(name).exists()


def _model(args: GRPOConfig, model: PreTrainedModel) -> dict[str, Any]:
    init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    name, public = get_config_model_id(model.config), public_model_id(model)
    origin = {"folder": Path(name).name} if name and not public else {"id": public}
    return {
        **origin,
        "revision": init_kwargs.get("revision"),
        "commit": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        **_quantization(model),
    }


def _quantization(model: PreTrainedModel) -> dict[str, Any]:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return {}
    values = config if isinstance(config, dict) else config.to_dict()
    return {"quantization": {name: value for name, value in values.items() if not name.startswith("_")}}


def _training(args: GRPOConfig) -> dict[str, Any]:
    changed = {
        f.name: getattr(args, f.name)
        for f in fields(args)
        if f.init and not _is_place(f.name)
        if f.name in _ALWAYS or _plain(getattr(args, f.name)) not in _defaults(f)
    }
    adapter = args.adapter_name_or_path
    if adapter is not None and not is_hub_id(adapter):
        changed["adapter_name_or_path"] = Path(adapter).name
    # Each follows from the other, and a config takes only one
    changed.pop("generation_batch_size", None)
    return changed


def _defaults(f: Field[Any]) -> list[Any]:
    """What the field holds if nobody sets it. No config is made to find out: that would reset accelerate's state."""
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    return [_plain(default), *_FILLED_IN.get(f.name, ())]


def _is_place(name: str) -> bool:
    return name in _PLACE or name.startswith(("hub_", "push_to_hub")) or name.endswith("_token")


def _adapter(config: PeftConfig) -> dict[str, Any]:
    values, defaults = config.to_dict(), type(config)().to_dict()
    changed = {
        name: value
        for name, value in values.items()
        if name not in _NOT_OF_THE_ADAPTER and (name == "peft_type" or _plain(value) != _plain(defaults.get(name)))
    }
    return {"peft_type": changed.pop("peft_type"), **changed}


def _plain(value: Any) -> Any:
    """What YAML can hold; sets in order, dtypes and enums by their names, anything else as its text."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    to_dict = getattr(value, "to_dict", None)
    return _plain(to_dict()) if callable(to_dict) else str(value)
