"""The base's fingerprint: every byte of the base, and nothing of the adapter."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

import trl_grpo_ext.policy.fingerprint as fingerprint
from trl_grpo_ext import base_fingerprint
from trl_grpo_ext.policy import load_model

QUANTIZATIONS = {
    "none": None,
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("qwen2", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load(folder, quantization):
    config = QUANTIZATIONS[quantization]
    return load_model(str(folder), {"device_map": None}, BitsAndBytesConfig(**config) if config else None)


class TwoTensors(nn.Module):
    """A weight and two buffers, of which one is not saved."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)


def test_by_hand():
    def digest(data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=32).digest()

    weight, count = torch.arange(6.0).numpy().tobytes(), torch.tensor(7).numpy().tobytes()
    whole = hashlib.blake2b(digest_size=32)
    whole.update(b"weight torch.float32 [2, 3]\n" + digest(weight) + b"count torch.int64 []\n" + digest(count))
    model = TwoTensors()
    assert base_fingerprint(model) == whole.hexdigest()
    model.scratch += 1
    assert base_fingerprint(model) == whole.hexdigest()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_adapter_is_no_part_of_it(folder, quantization, adapter):
    model = load(folder, quantization)
    plain = base_fingerprint(model)
    assert len(plain) == 64
    assert base_fingerprint(load(folder, quantization)) == plain
    adapted = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **ADAPTERS[adapter]))
    assert base_fingerprint(adapted) == plain
    assert base_fingerprint(adapted.get_base_model()) == plain
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 1
    assert base_fingerprint(adapted) == plain


def test_quantizations_differ(folder):
    assert len({base_fingerprint(load(folder, quantization)) for quantization in QUANTIZATIONS}) == len(QUANTIZATIONS)


def one_bit(tensor):
    """Flip the lowest bit of the last byte."""
    tensor.view(-1).view(torch.uint8)[-1] ^= 1


def state_of(model):
    return model.model.layers[1].mlp.down_proj.weight.quant_state


CHANGES = {
    "a weight": ("none", lambda m: one_bit(m.model.layers[1].mlp.down_proj.weight.data)),
    "a norm": ("none", lambda m: one_bit(m.model.norm.weight.data)),
    "a dtype": ("none", lambda m: m.model.norm.to(torch.float64)),
    "a shape": ("none", lambda m: setattr(m.model.norm.weight, "data", m.model.norm.weight.data.view(2, 32))),
    "4-bit codes": ("nf4", lambda m: one_bit(m.model.layers[1].mlp.down_proj.weight.data)),
    "absmax": ("nf4", lambda m: one_bit(state_of(m).absmax)),
    "code": ("nf4", lambda m: one_bit(state_of(m).code)),
    "blocksize": ("nf4", lambda m: setattr(state_of(m), "blocksize", 128)),
    "nested absmax": ("fp4 nested", lambda m: one_bit(state_of(m).state2.absmax)),
    "nested code": ("fp4 nested", lambda m: one_bit(state_of(m).state2.code)),
    "offset": ("fp4 nested", lambda m: one_bit(state_of(m).offset)),
    "8-bit codes": ("8bit", lambda m: one_bit(m.model.layers[1].mlp.down_proj.weight.data)),
    "8-bit scales": ("8bit", lambda m: one_bit(m.model.layers[1].mlp.down_proj.weight.SCB)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_part_of_the_base_is_in_it(folder, change):
    quantization, apply = CHANGES[change]
    model = load(folder, quantization)
    before = base_fingerprint(model)
    with torch.no_grad():
        apply(model)
    assert base_fingerprint(model) != before


def test_names_are_in_it(make_model):
    """Two layers that change places are another base."""
    model = make_model("qwen2")
    before = base_fingerprint(model)
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert base_fingerprint(model) != before


@pytest.mark.parametrize("size", [1, 64, 100, 10**9])
def test_chunks_are_bounded(make_model, monkeypatch, size):
    """No more than a chunk is copied at a time, whatever a weight's size."""
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", size)
    seen = []
    digest = fingerprint._digest
    monkeypatch.setattr(fingerprint, "_digest", lambda chunk: seen.append(chunk.nbytes) or digest(chunk))
    model = nn.Linear(5, 7)
    base_fingerprint(model)
    assert sum(seen) == 4 * (35 + 7)
    assert max(seen) <= max(4, size)


def test_dtypes_that_numpy_does_not_have():
    prints = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool):
        model = TwoTensors()
        model.weight = nn.Parameter(torch.ones(2, 3).to(dtype), requires_grad=False)
        prints.add(base_fingerprint(model))
    assert len(prints) == 4


def test_a_weight_that_is_not_contiguous():
    straight, transposed = TwoTensors(), TwoTensors()
    transposed.weight.data = straight.weight.data.t().contiguous().t()
    assert not transposed.weight.is_contiguous()
    assert base_fingerprint(transposed) == base_fingerprint(straight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4 nested"])
def test_the_device_does_not_matter(folder, quantization):
    model = load(folder, quantization)
    before = base_fingerprint(model)
    assert base_fingerprint(copy.deepcopy(model).to("cuda" if model.device.type == "cpu" else "cpu")) == before
