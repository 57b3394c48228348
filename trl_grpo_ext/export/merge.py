"""An adapter merged into its base's original weights: checked by log-probabilities, written whole or not at all."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..adapter_source import (
    DTYPES,
    LOAD_ERRORS,
    AdapterSource,
    dtype_name,
    first_line,
    load_adapter,
    load_tokenizer,
    quantization_of,
    read_adapter,
    read_base_config,
)
from ..data import Prompt, PromptEncoder
from ..free_memory import pick_device
from ..policy import context_limit
from .check import SAMPLE_PROMPTS, LogpDifference, TextScores, compare, continue_greedily, score_texts
from .folder import written_whole
from .room import adapter_entries, bytes_needed, check_room, empty_model
from .weights import merge_weights, parameter_dtypes

REPORT_FILE = "merge_report.json"
# Where everything is computed in float32: a correct merge differs by 1e-6 to 1e-5
FLOAT32_TOLERANCE = 1e-4
_SHARD = "2GB"  # size of the written files, and so of what saving from a GPU copies at a time


class MergeCheckError(RuntimeError):
    """The merged model does not say what base + adapter say; nothing was written."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was merged, and how the result compares; `merge_report.json` holds the same."""

    adapter: str
    peft_type: str
    base: str
    base_revision: str | None
    base_dtype: str  # in which base + adapter were computed
    dtype: str  # of the merged model
    device: str
    prompts: int
    difference: LogpDifference  # merged model against base + adapter
    adapter_effect: LogpDifference  # base alone against base + adapter: the scale of the above
    tolerance: float | None  # for `difference.max`; None: none, but `difference.mean` below `adapter_effect.mean`
    merged_weights: int  # tensors that the adapter changed
    update_lost: float  # share of the update's entries that rounding to `dtype` undid
    update_error: float  # norm of what rounding changed, relative to the update's
    tie_word_embeddings: bool  # of the merged model
    bytes_needed: int
    bytes_free: int | None
    versions: dict[str, str]


def merge_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
    base_revision: str | None = None,
    dtype: str = "auto",
    prompts: Sequence[Prompt] | None = None,
    continuation: int = 16,
    tolerance: float | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge an adapter into its base's original 16- or 32-bit weights and write the model that results.

    The base is loaded as it is stored, never quantized. Each weight is merged in float32 and rounded once. The model is
    written beside `output`, loaded again from there, and compared with base + adapter on `prompts`; only then does the
    folder get its name. It has the tokenizer (the adapter's, if one was saved with it), its chat template, the base's
    generation config and `merge_report.json`, and loads with `AutoModelForCausalLM.from_pretrained`.

    Args:
        adapter: Folder or Hub id.
        output: Folder to write; it must not exist, or be empty.
        base, base_revision: Instead of those that the adapter's config names.
        dtype: "auto" (the base's), "float32", "bfloat16" or "float16".
        prompts: Texts or lists of messages; by default `SAMPLE_PROMPTS`.
        continuation: Tokens by which base + adapter continue each prompt greedily, compared too.
        tolerance: Largest difference of a log-probability. By default 1e-4 where base and result are float32. Elsewhere
            rounding decides, and the mean difference must be below what the adapter itself changes on average.
        device: By default the GPU if there is one, else the CPU.

    Raises:
        ValueError: for an adapter or base that cannot be merged, a base stored quantized, an `output` that is taken,
            prompts without room in the model's context.
        MemoryError: if the base, or the disk's share of the result, would not fit; with figures.
        MergeCheckError: if the difference is too large.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance} must be a number of at least 0. Leave it unset for the default.")
    source, config, tokenizer, target = _resolve(adapter, output, base, base_revision, dtype, trust_remote_code)
    place = pick_device(device)
    chosen = _conversations(tokenizer) if prompts is None else list(prompts)
    empty = empty_model(config, source.base, trust_remote_code)
    prompt_ids = _encode(chosen, tokenizer, context_limit(empty), continuation)
    longest = max(map(len, prompt_ids)) + continuation
    needed = bytes_needed(
        empty, adapter_entries(source.path), itemsize=4 if dtype == "float32" else None, tokens=longest
    )
    free = check_room(needed, target, place)

    model, loaded = _load_base(source, dtype, place, trust_remote_code)
    kept = loaded if dtype == "auto" else DTYPES[dtype]
    dtypes = parameter_dtypes(model)
    wrapped = load_adapter(model, source)
    texts, expected, effect = _reference(wrapped, prompt_ids, continuation)
    merged, rounding = merge_weights(wrapped, dtypes, loaded, kept)
    del model, wrapped
    with written_whole(target) as folder:
        merged.save_pretrained(folder, max_shard_size=_SHARD)
        tokenizer.save_pretrained(folder)
        del merged
        gc.collect()
        written = _load_written(folder, place, trust_remote_code)
        if written.dtype != kept:
            raise MergeCheckError(f"the written model loads in {dtype_name(written.dtype)}, not {dtype_name(kept)}")
        difference = compare(score_texts(written, texts), expected)
        limit = tolerance
        if tolerance is None and loaded == kept == torch.float32:
            limit = FLOAT32_TOLERANCE
        _judge(difference, effect, limit, kept)
        report = MergeReport(
            adapter=source.path,
            peft_type=str(getattr(source.config.peft_type, "value", source.config.peft_type)),
            base=source.base,
            base_revision=source.base_revision,
            base_dtype=dtype_name(loaded),
            dtype=dtype_name(kept),
            device=str(place),
            prompts=len(texts),
            difference=difference,
            adapter_effect=effect,
            tolerance=limit,
            merged_weights=rounding.weights,
            update_lost=rounding.lost_share,
            update_error=rounding.relative_error,
            tie_word_embeddings=bool(getattr(written.config.get_text_config(), "tie_word_embeddings", False)),
            bytes_needed=needed,
            bytes_free=free,
            versions={"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        )
        (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _resolve(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    base: str | None,
    revision: str | None,
    dtype: str,
    trust_remote_code: bool,
) -> tuple[AdapterSource, PretrainedConfig, PreTrainedTokenizerBase, Path]:
    """Everything that can be refused before a weight is read."""
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output={str(target)!r} exists already: pass a new folder, or remove it")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {['auto', *DTYPES]}")
    source = read_adapter(adapter, base, revision)
    if problem := _unmergeable(source.config):
        raise ValueError(f"adapter={source.path!r} cannot be merged: {problem}. Load it with peft instead.")
    config = read_base_config(source.base, source.base_revision, trust_remote_code)
    if stored := quantization_of(config):
        raise ValueError(
            f"base={source.base!r} is stored quantized ({stored}): its original weights are gone, and merging into "
            "dequantized ones would keep their error. Pass base=, the 16-bit model that it was made from."
        )
    tokenizer = load_tokenizer(source, source.base, source.base_revision, trust_remote_code)
    return source, config, tokenizer, target


def _unmergeable(config: peft.PeftConfig) -> str | None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or kind == "ADAPTION_PROMPT":
        return f"peft_type={kind} adds to the input, not to the weights"
    for name, why in (
        ("alora_invocation_tokens", "an activated LoRA (aLoRA) is off until its tokens appear"),
        ("arrow_config", "Arrow routes between several adapters for every token"),
        ("layer_replication", "its layers share base weights that would each be merged differently"),
    ):
        if getattr(config, name, None):
            return f"{name} is set: {why}"
    return None


def _conversations(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The built-in prompts, as messages where the model is a chat model."""
    if tokenizer.chat_template is None:
        return list(SAMPLE_PROMPTS)
    return [[{"role": "user", "content": text}] for text in SAMPLE_PROMPTS]


def _encode(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, limit: int | None, continuation: int
) -> list[list[int]]:
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to compare on")
    if continuation < 0:
        raise ValueError(f"continuation={continuation} must be 0 or more")
    encoder = PromptEncoder(tokenizer)
    ids = [encoder.encode(prompt).ids for prompt in prompts]
    for number, prompt in enumerate(ids):
        if len(prompt) + continuation < 2:
            raise ValueError(f"prompt {number} has 1 token, whose log-probability nothing predicts: use a longer one")
        if limit is not None and len(prompt) + continuation > limit:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, and with continuation={continuation} more than the "
                f"model's context of {limit}. Use shorter prompts."
            )
    return ids


def _load_base(
    source: AdapterSource, dtype: str, device: torch.device, trust_remote_code: bool
) -> tuple[PreTrainedModel, torch.dtype]:
    """The base as it is stored, or, for a merge in float32, in that; and its dtype."""
    try:
        model = cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_pretrained(
                source.base,
                revision=source.base_revision,
                dtype="auto",
                device_map=None if device.type == "cpu" else {"": device},
                trust_remote_code=trust_remote_code,
            ),
        )
    except LOAD_ERRORS as error:
        raise ValueError(f"base={source.base!r} cannot be loaded: {first_line(error)}") from error
    if model.dtype not in DTYPES.values() or getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            f"base={source.base!r} is stored in {dtype_name(model.dtype)}, and adapters are merged into the original "
            f"{', '.join(DTYPES)} weights only. Pass base=, the model that it was made from."
        )
    if dtype == "float32":
        model = model.float()
    model.eval()
    return model, model.dtype


def _load_written(folder: Path, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map=None if device.type == "cpu" else {"": device},
        trust_remote_code=trust_remote_code,
    )
    model.eval()
    return cast(PreTrainedModel, model)


def _reference(
    model: PeftModel, prompt_ids: list[list[int]], continuation: int
) -> tuple[list[list[int]], list[TextScores], LogpDifference]:
    """The texts, what base + adapter make of them, and how far the base alone is from that."""
    texts = continue_greedily(model, prompt_ids, continuation)
    expected = score_texts(model, texts)
    with model.disable_adapter():
        effect = compare(score_texts(model, texts), expected)
    return texts, expected, effect


def _judge(difference: LogpDifference, effect: LogpDifference, limit: float | None, kept: torch.dtype) -> None:
    if limit is not None and not difference.max <= limit:
        raise MergeCheckError(
            f"the merged model's log-probabilities differ from base + adapter by up to {difference.max:.3g} (mean "
            f"{difference.mean:.3g}), more than tolerance={limit:g}; nothing was written. Merge with dtype='float32', "
            "or allow more."
        )
    if limit is None and effect.mean > 0 and difference.mean >= effect.mean:
        raise MergeCheckError(
            f"rounding to {dtype_name(kept)} costs as much as the adapter gives: log-probabilities differ from base + "
            f"adapter by {difference.mean:.3g} on average, and the adapter changes them by {effect.mean:.3g}; nothing "
            "was written. Merge with dtype='float32', or set a tolerance."
        )
