"""`training_config.yaml`, which a run leaves behind, as options of `trl-grpo train`; and options as a part of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SECTION = "recipe"  # of a run that `trl-grpo train` made: its options, but for those of `GRPOConfig`
_LOCAL = ("dry_run", "dry_run_prompts")


def recipe_of(groups: Sequence[Any]) -> dict[str, Any]:
    """The options that are not at their default, as YAML holds them; of an absolute path only its last part.

    Args:
        groups: The options' dataclasses, those of `GRPOConfig` excepted.
    """
    found = {}
    for group in groups:
        for f in fields(group):
            value = getattr(group, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if f.name not in _LOCAL and value != default:
                found[f.name] = _without_place(value)
    return found


def options_of_record(config: dict[str, Any]) -> dict[str, Any]:
    """What `training_config.yaml` says, as the options of `trl-grpo train`; any other mapping as it is.

    A run of `trl-grpo train` has its options in it. Of a run that was made in Python, it has what the trainer was
    given: base, adapter, fields of the config, the names of rewards, and which dataset it was, if that has an id on the
    Hub. What cannot be told from it is warned of, and missed later on unless another option says it.
    """
    if not all(isinstance(config.get(section), dict) for section in ("model", "training")):
        return config
    training = {name: value for name, value in config["training"].items() if name != "reward_weights"}
    recipe = config.get(SECTION)
    if isinstance(recipe, dict):
        own = dict(recipe)
        for name in ("dtype", "revision"):  # the run put them there, and so would the next one
            if name in own and isinstance(training.get("model_init_kwargs"), dict):
                training["model_init_kwargs"] = dict(training["model_init_kwargs"])
                training["model_init_kwargs"].pop(name, None)
        return {**training, **own}
    return {
        **training,
        **_model(config["model"], training),
        **_adapter(config.get("adapter"), training),
        **_prompts(config.get("datasets") or {}),
        **_rewards(config.get("rewards") or []),
    }


def _model(model: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    init_kwargs = training.get("model_init_kwargs") or {}
    found = {"model": model.get("id") or model.get("folder")}
    if model.get("revision") and "revision" not in init_kwargs:
        found["revision"] = model["revision"]
    if model.get("dtype") in ("bfloat16", "float16") and "dtype" not in init_kwargs:
        found["dtype"] = model["dtype"]
    if model.get("quantization") and "quantization_config" not in init_kwargs:
        found["quantize"] = model["quantization"]
    return {name: value for name, value in found.items() if value is not None}


def _adapter(adapter: Any, training: Mapping[str, Any]) -> dict[str, Any]:
    if "adapter_name_or_path" in training:
        return {}
    return {"adapter": adapter or "none"}


def _prompts(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    about = datasets.get("train") or {}
    if "id" not in about:
        logger.warning("The record does not say which dataset the run was trained on: pass --dataset.")
        return {}
    names = {"id": "dataset", "config": "dataset_config", "split": "dataset_split"}
    return {option: about[name] for name, option in names.items() if name in about}


def _rewards(rewards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rewards by the names they are logged by, which for most is the name with `_reward` after it."""
    from ..rewards.registry import reward_names

    known = {name: name for name in reward_names()}
    known |= {f"{name}_reward": name for name in reward_names()}
    lost = [reward["name"] for reward in rewards if reward["name"] not in known]
    if lost:
        logger.warning("The record has rewards that are not of this package (%s): pass --rewards.", ", ".join(lost))
        return {}
    return {"rewards": [{"name": known[reward["name"]], "weight": reward["weight"]} for reward in rewards]}


def _without_place(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_without_place(key): _without_place(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_place(item) for item in value]
    if isinstance(value, str):
        name, _, rest = value.rpartition(":")  # gsm8k:FILE, but not FILE.py:NAME
        if _is_place(value):
            return Path(value).name
        if name and _is_place(rest):
            return f"{name}:{Path(rest).name}"
    return value


def _is_place(value: str) -> bool:
    """Whether it is a path on this machine, and no text or URL."""
    return value.startswith(("/", "~", "../")) and not value.startswith("//") and "\n" not in value
