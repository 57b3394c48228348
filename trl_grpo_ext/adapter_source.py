"""Where an adapter comes from: its folder or Hub repository, its config, and the base model it was trained on."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
# What loading from a folder or the Hub raises: nothing there, files missing or damaged, shapes that do not fit
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter that was saved by PEFT, and not yet loaded."""

    path: str  # folder or Hub id
    config: PeftConfig
    base: str  # folder or Hub id of the base model
    base_revision: str | None


def read_adapter(path: str | os.PathLike[str], base: str | None = None, revision: str | None = None) -> AdapterSource:
    """Read an adapter's config.

    Args:
        path: Its folder, or its id on the Hub.
        base: Base model to use instead of the one that the config names.
        revision: Of the base; by default the config's, unless `base` is given.

    Raises:
        ValueError: if there is no adapter, or no base is known.
    """
    name = os.fspath(path)
    if Path(name).is_dir():
        if not (Path(name) / ADAPTER_CONFIG).is_file():
            inside = sorted(found.parent.name for found in Path(name).glob(f"*/{ADAPTER_CONFIG}"))
            hint = f" Its subfolder(s) {', '.join(inside)} have one." if inside else ""
            raise ValueError(
                f"adapter={name!r} has no {ADAPTER_CONFIG}, so it is not a folder that PEFT saved an adapter in.{hint} "
                "Pass the folder that save_model or save_pretrained wrote."
            )
    elif Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"adapter={name!r} is not a folder. Pass the folder that save_model wrote, or a Hub id.")
    try:
        config = PeftConfig.from_pretrained(name)
    except LOAD_ERRORS as error:
        raise ValueError(f"adapter={name!r} cannot be read: {first_line(error)}") from error
    found_base = base or config.base_model_name_or_path
    if not found_base:
        raise ValueError(f"adapter={name!r} does not say which base model it is for (base_model_name_or_path): pass it")
    return AdapterSource(name, config, found_base, revision if base else revision or config.revision)


def first_line(error: BaseException) -> str:
    """The first line of an error's message (the libraries' have many), with the second where it announces that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def read_base_config(base: str, revision: str | None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base model's config.

    Raises:
        ValueError: if there is none.
    """
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ValueError(f"base={base!r} has no config.json: pass a folder that save_pretrained wrote, or a Hub id")
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise ValueError(f"base={base!r} cannot be found: {first_line(error)}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def quantization_of(config: PretrainedConfig) -> str | None:
    """How a model's weights are stored quantized, such as "bitsandbytes 4-bit nf4"; None if they are not."""
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method")
    words = [str(getattr(method, "value", method) or "an unnamed method")]
    if values.get("load_in_4bit") or values.get("_load_in_4bit"):
        words += ["4-bit", str(values.get("bnb_4bit_quant_type", ""))]
    elif values.get("load_in_8bit") or values.get("_load_in_8bit"):
        words.append("8-bit")
    elif values.get("bits") or values.get("w_bit"):
        words.append(f"{values.get('bits') or values.get('w_bit')}-bit")
    return " ".join(word for word in words if word)


def load_adapter(model: PreTrainedModel, source: AdapterSource) -> PeftModel:
    """`model` with the adapter on it, for inference; 16-bit adapter weights are read into float32.

    Raises:
        ValueError: if the adapter does not fit: other shapes, or layers without counterpart.
    """
    try:
        # Twice, because only the second call tells what it could not place
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(model, source.path)
        result = wrapped.load_adapter(source.path, wrapped.active_adapter)
    except LOAD_ERRORS as error:
        raise ValueError(
            f"adapter={source.path!r} does not fit the base model {source.base!r}: {first_line(error)}"
        ) from error
    for kind, keys in (("lacks", result.missing_keys), ("has no place for", result.unexpected_keys)):
        if keys:
            subject = "the adapter" if kind == "lacks" else "the base model"
            raise ValueError(
                f"adapter={source.path!r} does not fit the base model {source.base!r}: {subject} {kind} {len(keys)} "
                f"weight(s), the first {sorted(keys)[0]!r}. Pass the base that the adapter was trained on."
            )
    wrapped.eval()
    return wrapped


def load_tokenizer(
    source: AdapterSource | None, base: str, revision: str | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter (its chat template may have changed in training), or else the base's.

    Raises:
        ValueError: if there is none.
    """
    own = source is not None and any(_has_file(source.path, name) for name in TOKENIZER_FILES)
    place, at = (source.path, None) if own and source is not None else (base, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=at, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise ValueError(f"{place!r} has no tokenizer that can be loaded: {first_line(error)}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _has_file(path: str, name: str) -> bool:
    """Whether a folder, or a repository on the Hub, has a file."""
    if Path(path).is_dir():
        return (Path(path) / name).is_file()
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
