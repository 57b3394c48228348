"""A hash of the base, by which anybody can see that training did not change it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear8bitLt, Params4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..quantized import scales_8bit

_CHUNK_BYTES = 16 * 2**20
_MAX_THREADS = 8


@torch.no_grad()
def base_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Hash of every tensor of the base, 64 hexadecimal digits; adapters are left out.

    Of each parameter and each buffer that is saved with a model: name, dtype, shape and bytes. Of 4-bit and 8-bit
    weights (bitsandbytes) the scales as well, nested ones included, and the rest of what it takes to dequantize them.
    The same for a model and for a `PeftModel` around it, and on every device. Tensors are read 16 MiB at a time, by
    several threads; nothing is copied as a whole.

    BLAKE2b (RFC 7693), of the digests of chunks.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    whole = hashlib.blake2b(digest_size=32)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for name, value in _base_tensors(base, ""):
            if not isinstance(value, torch.Tensor):
                whole.update(f"{name}={value}\n".encode())
                continue
            whole.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            for digest in pool.map(_digest, _chunks(value)):
                whole.update(digest)
    return whole.hexdigest()


def _base_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor or setting), with the names of the model before PEFT wrapped it."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_tensors(module.get_base_layer(), prefix)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_tensors(module.original_module, prefix)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}{name}", parameter.data
            yield from _quantized_state(module, parameter, f"{prefix}{name}")
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield f"{prefix}{name}", buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from _base_tensors(child, f"{prefix}{name}.")


def _quantized_state(module: nn.Module, parameter: nn.Parameter, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(module, Linear8bitLt) and parameter is module.weight:
        yield f"{name}.SCB", scales_8bit(module)
    state = parameter.quant_state if isinstance(parameter, Params4bit) else None
    nested = ""
    while state is not None:
        for field in ("absmax", "code", "offset", "shape", "dtype", "blocksize", "quant_type"):
            yield f"{name}.{nested}{field}", getattr(state, field, None)
        state = getattr(state, "state2", None)
        nested += "nested_"


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.detach().reshape(-1)  # a view of a weight that is contiguous
    size = max(1, _CHUNK_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), size):
        yield flat[start : start + size]


def _digest(chunk: torch.Tensor) -> bytes:
    # Threads help because hashing, and copying from a device, do not hold Python's lock
    data: Any = chunk.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=32).digest()
