"""The estimate of a run's memory: by hand, and against models that are really there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trl_grpo_ext.attention import use_group_attention
from trl_grpo_ext.memory_estimate import Load, MemoryEstimate, estimate_memory, meta_model, quantized_bytes
from trl_grpo_ext.policy import CompletionScorer, RecomputeBudget, add_adapter

# 2 prompts of at most 11 tokens, 3 completions each of at most 70, in micro-batches of 4
LOAD = Load(prompts=2, completions=6, micro_batch=4, prompt_tokens=11, completion_tokens=70, num_generations=3)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def shapes_of(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return meta_model(model.config, dtype)


def lora(model: PreTrainedModel, rank: int = 4) -> Any:
    config = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device(model.device):
        return add_adapter(model, config)


def test_quantized_bytes_by_hand() -> None:
    weight = torch.empty(100, 64, device="meta")  # 6400 weights in 100 blocks of 64
    assert quantized_bytes(weight, NF4) == 3200 + 100 + 4  # a byte per block, and one float32 for 256 of them
    assert quantized_bytes(weight, BitsAndBytesConfig(load_in_4bit=True)) == 3200 + 400
    assert quantized_bytes(weight, BitsAndBytesConfig(load_in_8bit=True)) == 6400 + 400  # a float32 per row


def test_by_hand(make_model: Callable[..., PreTrainedModel]) -> None:
    # Qwen2: hidden 32, inner 48, 2 layers, 4 heads of 8 (2 of keys and values), vocabulary 259, head not tied
    attention = 2 * (32 * 32) + 2 * (32 * 16) + 32 + 2 * 16  # q, o; k, v; the biases of q, k, v
    base = 2 * (attention + 3 * 32 * 48 + 2 * 32) + 32 + 2 * 259 * 32
    # r = 4 on q, k, v, o, gate, up, down: r * (in + out)
    adapter = 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    found = estimate_memory(lora(shapes_of(make_model())), LOAD)
    assert (found.parameters, found.trainable_parameters) == (base + adapter, adapter)
    assert (found.base, found.trained, found.gradients, found.optimizer) == (
        4 * base,
        4 * adapter,
        4 * adapter,
        8 * adapter,
    )
    # keys and values of 2 layers * 2 heads * 8, in float32; completions in chunks of 64: 128 tokens
    assert found.cache == 2 * 2 * 2 * 8 * 4 * (2 * 11 + 6 * 128)
    assert found.drawing == 6 * 259 * 24
    assert found.head == 4 * 70 * 32 * (4 + 4)
    assert found.reference == 0
    assert found.resident == 4 * base + 16 * adapter
    assert found.peak == found.resident + max(found.cache + found.drawing, found.activations + found.head)


def test_sixteen_bits_and_full_fine_tuning(make_model: Callable[..., PreTrainedModel]) -> None:
    half = estimate_memory(lora(shapes_of(make_model(), torch.bfloat16)), LOAD, compute_dtype=torch.bfloat16)
    whole = estimate_memory(lora(shapes_of(make_model())), LOAD)
    assert (2 * half.base, half.trained, 2 * half.cache) == (whole.base, whole.trained, whole.cache)
    everything = estimate_memory(shapes_of(make_model()), LOAD, has_reference=True)
    assert (everything.base, everything.trained) == (0, whole.base)
    assert everything.reference == everything.trained
    small = estimate_memory(shapes_of(make_model()), LOAD, optimizer="adamw_8bit")
    assert 4 * small.optimizer == everything.optimizer
    assert estimate_memory(shapes_of(make_model()), LOAD, optimizer="sgd").optimizer == 0


def test_tied_embeddings_count_once(make_model: Callable[..., PreTrainedModel]) -> None:
    tied, untied = (shapes_of(make_model(tie_word_embeddings=tie)) for tie in (True, False))
    difference = estimate_memory(untied, LOAD).parameters - estimate_memory(tied, LOAD).parameters
    assert difference == 259 * 32


def test_a_quantized_base_takes_what_bitsandbytes_makes_of_it(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    original = make_model(hidden_size=64, intermediate_size=128, num_attention_heads=4)
    original.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4, dtype=torch.float32)
    real = sum(parameter.nbytes for parameter in loaded.parameters())
    for module in loaded.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            real += state.absmax.nbytes + state.state2.absmax.nbytes
    found = estimate_memory(lora(shapes_of(original)), LOAD, quantization=NF4)
    assert found.base == real


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_activations_are_those_that_a_pass_keeps(make_model: Callable[..., PreTrainedModel], kind: str) -> None:
    model = make_model(kind, head_dim=8)
    policy = lora(model)
    scorer = CompletionScorer(model, 1.0)
    assert use_group_attention(model)
    budget = RecomputeBudget(policy, model, scorer)
    measured = budget._activation_bytes  # of a layer, per token
    whole = estimate_memory(lora(shapes_of(make_model(kind, head_dim=8))), LOAD, checkpointing=False)
    # 2 groups of 11 tokens and 4 completions of 70 in a row, 2 layers
    counted = whole.activations / (2 * 11 + 4 * 70) / 2
    assert counted == pytest.approx(measured, rel=0.25)
    recomputed = estimate_memory(lora(shapes_of(make_model(kind, head_dim=8))), LOAD)
    # inputs of 2 layers and the activations of one, of the padded micro-batch
    assert recomputed.activations == pytest.approx(4 * (11 + 70) * (2 * 32 * 4 + counted), rel=1e-6)


def test_sizes_that_the_model_cards_state() -> None:
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = meta_model(config, torch.bfloat16)
    assert model.num_parameters() == 1_543_714_304  # Qwen2.5-1.5B: "1.54B"
    found: MemoryEstimate = estimate_memory(model, LOAD, compute_dtype=torch.bfloat16)
    assert found.trained == 2 * 1_543_714_304
    assert next(model.parameters()).device.type == "meta"
