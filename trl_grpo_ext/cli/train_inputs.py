"""What the libraries make of the options of `trl-grpo train`: arguments of `load_prompts`, PEFT's and bitsandbytes'
configs, specs of rewards."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prompt_options import TrainPrompts
from .train_options import TrainAdapter, TrainModel, TrainRewards

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

    from ..config import GRPOConfig

_LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
# Option -> field of LoraConfig
_LORA_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
# Whatever an evaluation does not share with training: how rows are chosen
_NOT_OF_EVALUATION = ("decontaminate", "pass_rate", "skip", "shuffle", "streaming", "stopping_strategy")


def prompt_arguments(options: TrainPrompts) -> dict[str, Any]:
    """The arguments of `load_prompts` for training, `source` included; what `overrides` say of a source that only
    `eval_dataset` names is not among them.

    Raises:
        ValueError: without a dataset, or with a band of pass rates that is no pair.
    """
    found = options.arguments()
    if found["overrides"]:
        given = options.eval_dataset
        held_out = _names(given.get("source") if isinstance(given, Mapping) else given)
        only = {name for name in held_out if name not in (*_names(options.dataset), *found["decontaminate"])}
        found["overrides"] = {name: values for name, values in found["overrides"].items() if name not in only}
    return found


def eval_prompt_arguments(options: TrainPrompts) -> dict[str, dict[str, Any]]:
    """The arguments of `load_prompts` for each held-out set, by its name; none where no `eval_dataset` is given.

    Raises:
        ValueError: for a mapping without `source`, or with a key that `load_prompts` does not have; for a source that
            is named twice.
    """
    given = options.eval_dataset
    if not given:
        return {}
    shared = {name: value for name, value in options.arguments().items() if name not in _NOT_OF_EVALUATION}
    # No duplicates are taken out: a test set is what it is
    shared |= {"split": options.eval_split, "take": options.eval_take, "deduplicate": "off"}
    if not isinstance(given, Mapping):
        names = _names(given)
        labels = _labels(names)
        return {label: shared | _of_source(name, options) for label, name in zip(labels, names, strict=True)}
    known = [*shared, *_NOT_OF_EVALUATION]
    for key in given:
        if key not in known:
            raise ValueError(f"eval_dataset has no key {key!r}{nearest(str(key), known)}; they are {', '.join(known)}")
    if "source" not in given:
        raise ValueError("eval_dataset is a mapping without source: say where the held-out prompts come from")
    source = given["source"]
    if not isinstance(source, str | list | Mapping) or not source:
        raise ValueError(f"eval_dataset: source={source!r} must be a name, a list of names, or a mapping to weights")
    own = _of_source(source, options) if isinstance(source, str) else {"overrides": _said_of(_names(source), options)}
    return {_labels([source])[0] if isinstance(source, str) else "eval": shared | own | given}


def _names(source: Any) -> list[str]:
    """Of one source, several, or a mixture."""
    return [source] if isinstance(source, str) else [str(name) for name in source or ()]


def _labels(sources: Sequence[str]) -> list[str]:
    """What metrics call them: `gsm8k` for openai/gsm8k and gsm8k:data/test.jsonl, `hard` for data/hard.jsonl.

    Where two would be called the same, all have their whole names.
    """
    from ..data.sources import reader_of

    twice = next((name for name in sources if sources.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"eval_dataset names {twice!r} twice: leave one of them out")
    labels = []
    for source in sources:
        name, colon, file = source.partition(":")
        if colon and reader_of(file):
            labels.append(name)
        else:
            last = source.rpartition("/")[2]
            labels.append(Path(last.removesuffix(".gz")).stem if reader_of(source) else last)
    return labels if len(set(labels)) == len(labels) and all(labels) else list(sources)


def _said_of(names: Sequence[str], options: TrainPrompts) -> dict[str, Any] | None:
    """What `overrides` say of these sources."""
    return {name: values for name, values in (options.overrides or {}).items() if name in names} or None


def _of_source(source: str, options: TrainPrompts) -> dict[str, Any]:
    """What training says of a source is said of that one alone, and the columns of a set known by name are known."""
    from ..data.sources import PROCEDURAL, REASONING_GYM, SOURCES

    config = options.dataset_config if source == options.dataset else None
    found = {"source": source, "overrides": _said_of([source], options), "config": config}
    known = (*SOURCES, PROCEDURAL, REASONING_GYM, *(declared.hub for declared in SOURCES.values()))
    declared = source != options.dataset and source.partition(":")[0] in known
    return found | ({"columns": None, "answer": None} if declared else {})


def reward_specs(options: TrainRewards) -> list[dict[str, Any]]:
    """What `load_rewards` takes: `accuracy:0.5` is `{name: accuracy, weight: 0.5}`.

    Raises:
        ValueError: without a reward.
    """
    given: Any = options.rewards
    if not given:
        raise ValueError(
            "rewards is missing: say what a completion is worth, --rewards accuracy:1.0 format:0.5, or rewards: in the "
            "YAML file"
        )
    specs = given if isinstance(given, list) else [given]
    return [_named(spec) if isinstance(spec, str) else dict(spec) for spec in specs]


def _named(text: str) -> dict[str, Any]:
    name, colon, last = text.rpartition(":")
    try:
        return {"name": name, "weight": float(last)} if colon and name else {"name": text}
    except ValueError:  # of trl:NAME, or FILE.py:NAME
        return {"name": text}


def merged_weights(weights: Sequence[float], specs: Sequence[Mapping[str, Any]], given: Any) -> list[float]:
    """The weights of the rewards' own list, or `reward_weights`, where one of both is given.

    Raises:
        ValueError: if both are, and differ.
    """
    if given is None:
        return list(weights)
    if any("weight" in spec for spec in specs) and list(given) != list(weights):
        raise ValueError(
            f"reward_weights={list(given)} and the weights {list(weights)} in rewards differ: keep one of them"
        )
    return [float(weight) for weight in given]


def peft_config_of(options: TrainAdapter, has_adapter: bool) -> PeftConfig | None:
    """The adapter to put on the model; None for full fine-tuning, and where there is one already.

    Args:
        has_adapter: `adapter_name_or_path` is given.

    Raises:
        ValueError: for options that exclude each other, or that PEFT does not know.
    """
    flat = {name: getattr(options, name) for name in _LORA_FIELDS if getattr(options, name) is not None}
    kind = options.adapter if options.adapter is not None else "none" if has_adapter else "lora"
    asked = [*flat, *(["lora"] if options.lora else [])]
    if isinstance(kind, Mapping) or kind == "none":
        if asked:
            which = "adapter is a mapping, which says it all" if isinstance(kind, Mapping) else "no LoRA is put on"
            raise ValueError(f"{', '.join(asked)}: {which}. Remove them, or set adapter: lora")
        return _of_mapping(kind) if isinstance(kind, Mapping) else None
    if kind != "lora":
        raise ValueError(
            f"adapter={kind!r} must be lora, none, or a mapping with peft_type{nearest(str(kind), ['lora', 'none'])}"
        )
    if has_adapter:
        raise ValueError(
            "adapter: lora puts a new adapter on the model, and adapter_name_or_path goes on with one that there is: "
            "leave one of them out"
        )
    values = {"task_type": "CAUSAL_LM"} | {_LORA_FIELDS[name]: value for name, value in _LORA.items()}
    values |= dict(options.lora or {}) | {_LORA_FIELDS[name]: value for name, value in flat.items()}
    if values["target_modules"] in (["all-linear"],):  # PEFT knows it as text only
        values["target_modules"] = "all-linear"
    return _of_mapping({"peft_type": "LORA", **values})


def _of_mapping(values: Mapping[str, Any]) -> PeftConfig:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(values.get("peft_type")).upper()
    if kind not in known:
        raise ValueError(
            f"adapter: peft_type={values.get('peft_type')!r} must be one of PEFT's{nearest(kind, list(known))}: "
            f"{', '.join(sorted(known))}"
        )
    names = [f.name for f in fields(known[kind]) if f.init]
    for name in values:
        if name != "peft_type" and name not in names:
            raise ValueError(f"{known[kind].__name__} has no field {name!r}{nearest(name, names)}")
    config: PeftConfig = known[kind](**{name: value for name, value in values.items() if name != "peft_type"})
    return config


def quantization_of(options: TrainModel, args: GRPOConfig) -> BitsAndBytesConfig | None:
    """How the base is quantized while it is loaded; computed in `dtype`, or else in what training computes in.

    Raises:
        ValueError: for another kind, or a setting that bitsandbytes does not have.
    """
    if options.quantize is None:
        return None
    if isinstance(options.quantize, Mapping):
        from inspect import signature

        from transformers import BitsAndBytesConfig

        known = [*signature(BitsAndBytesConfig).parameters, "quant_method"]
        for name in options.quantize:
            if name not in known:
                raise ValueError(f"quantize: BitsAndBytesConfig has no setting {name!r}{nearest(name, known)}")
        config: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(dict(options.quantize))
        return config
    from ..adapter_source import DTYPES
    from ..side_by_side import quantization

    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return quantization(options.quantize, DTYPES.get(options.dtype or mixed, DTYPES[mixed]))


def with_init_kwargs(options: TrainModel, args: GRPOConfig) -> None:
    """Put `dtype` and `revision` where the trainer reads them.

    Raises:
        ValueError: where `model_init_kwargs` says something else.
    """
    given = {"dtype": options.dtype, "revision": options.revision}
    kwargs = dict(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
    for name, value in given.items():
        if value is None:
            continue
        if kwargs.setdefault(name, value) != value:
            raise ValueError(f"{name}={value!r}, and model_init_kwargs has {name}={kwargs[name]!r}: keep one of them")
    args.model_init_kwargs = kwargs or None


def nearest(name: str, known: Sequence[str]) -> str:
    """ " (did you mean ...?)", or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
