"""Whether a merge fits, in memory and on the disk, said in figures before a weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import torch
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..adapter_source import LOAD_ERRORS, first_line
from ..free_memory import free_bytes, gib

# Copies, in float32, of the layer that is being merged: before, after, the update, and what compares them
_LAYER_COPIES = 8
_LOGITS_COPIES = 4  # in float32, of one text's logits


def empty_model(config: PretrainedConfig, base: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, without memory for its weights.

    Raises:
        ValueError: if it is not a causal language model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise ValueError(f"base={base!r} is not a causal language model: {first_line(error)}") from error
    return cast(PreTrainedModel, model)


def adapter_entries(path: str) -> int:
    """Numbers in a saved adapter.

    Raises:
        ValueError: if it has no weights that can be read.
    """
    try:
        return sum(tensor.numel() for tensor in load_peft_weights(path, device="cpu").values())
    except LOAD_ERRORS as error:
        raise ValueError(f"adapter={path!r} has no weights that can be read: {first_line(error)}") from error


def bytes_needed(empty: PreTrainedModel, adapter: int, *, itemsize: int | None, tokens: int) -> int:
    """Most memory that a merge takes at a time.

    That is the base once (the merge is in place, and the written model is loaded after it is gone), a second embedding
    where tied ones may have to be untied, the adapter in float32, as read and as loaded, the largest layer while it is
    merged, and the logits of the longest text.

    Args:
        empty: The base, without weights.
        adapter: Numbers in the adapter.
        itemsize: Bytes of a weight; None: as stored.
        tokens: Of the longest text that is compared.
    """
    config = empty.config.get_text_config()
    stored = empty.config.dtype or config.dtype or torch.float32
    size = cast(torch.dtype, stored).itemsize if itemsize is None else itemsize
    base = sum(parameter.numel() for parameter in empty.parameters())
    layer = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in empty.modules())
    table = cast(torch.Tensor, empty.get_input_embeddings().weight)
    embeddings = table.numel() if getattr(config, "tie_word_embeddings", False) else 0
    logits = tokens * config.vocab_size * _LOGITS_COPIES
    return int((base + embeddings) * size + 4 * (2 * adapter + _LAYER_COPIES * layer + logits))


def check_room(needed: int, target: Path, device: torch.device) -> int | None:
    """Bytes free on the device (None: unknown), after refusing a merge that would not fit there or on the disk.

    Raises:
        MemoryError: says what is needed and what is free.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        remedy = "Merge on the CPU (device='cpu')" if device.type != "cpu" else "Close other programs"
        raise MemoryError(
            f"merging needs {gib(needed)} on {device} and {gib(free)} are free there. {remedy}, or use a larger "
            "machine: an adapter is merged into unquantized weights only."
        )
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    disk = shutil.disk_usage(parent).free
    if needed > disk:  # what is written is most of what is held
        raise MemoryError(
            f"the merged model takes up to {gib(needed)} on disk and {gib(disk)} are free at output={str(target)!r}. "
            "Write it elsewhere."
        )
    return free
