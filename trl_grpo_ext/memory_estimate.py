"""What a training run needs of a device's memory, told from the model's shapes: nothing is loaded, nothing allocated.

The model is on the meta device. Of a process, with `P` prompts and `B` completions drawn at a time, a micro-batch of
`b` completions, prompts of at most `p` tokens, completions of at most `c`, `L` layers:

- base: every frozen parameter in its dtype; a quantized layer's in 4 or 8 bits, with its scales (QLoRA,
  arXiv:2305.14314 §3: one per 64 weights, itself in 8 bits where they are quantized twice);
- trained parameters: themselves, their gradients, and two states of AdamW, 16 bytes each where they are float32;
- reference: a copy of what trains, where there is one (`beta` above 0, and the base alone is not it);
- rollouts: `2 L kv_heads head_dim` numbers per token, for `P p` prompt tokens and `B c` of completions (prompts are
  shared), and 24 bytes per entry of `(B, vocabulary)` for drawing one token;
- update: with checkpointing `b (p + c)` tokens of `L` layer inputs and of one layer's activations (a packed row holds
  fewer tokens, and keeps activations in the room that this leaves, see `policy/recompute.py`); without, all activations
  of the packed row. A layer's activations are counted by a forward pass on shapes alone, adapter and all.

Rollouts and update come one after the other, so the larger one counts. Not counted: the CUDA context (0.5 to 1 GB),
fragmentation, reward models, and logits of the exact KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, BitsAndBytesConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .attention import dummy_mask
from .policy import base_model_of

_COUNTED_ATTENTION = "grpo_counted"
_PROBE_TOKENS = (64, 128)
_BLOCK = 64  # weights that share a scale in 4 bits
_SCALES_BLOCK = 256  # scales that share one, where they are quantized again
_DRAW_BYTES = 24  # per logit: as the model gives it, float32, log-probability, probability, float64 cumulative sum
_CACHE_CHUNK = 64  # tokens by which the cache of a completion grows
# Bytes of optimizer state per byte of parameter; of others, AdamW's is assumed
_STATES = {"sgd": 0.0, "adafactor": 0.0, "rmsprop": 1.0, "adagrad": 1.0, "lion_32bit": 1.0}


@dataclass(frozen=True, slots=True)
class Load:
    """What one process works on at a time."""

    prompts: int  # P, in one generation
    completions: int  # B, in one generation
    micro_batch: int  # b, completions in one forward pass of the update
    prompt_tokens: int  # p, of the longest prompt
    completion_tokens: int  # c, of the longest completion
    num_generations: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes."""

    base: int
    trained: int  # weights of what trains
    gradients: int
    optimizer: int
    reference: int
    cache: int  # keys and values of the rollouts
    drawing: int
    activations: int
    head: int  # hidden states of the scored tokens, their gradients
    trainable_parameters: int
    parameters: int

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.base + self.trained + self.gradients + self.optimizer + self.reference

    @property
    def rollouts(self) -> int:
        """On top of it while completions are drawn."""
        return self.cache + self.drawing

    @property
    def update(self) -> int:
        """On top of it in a forward and backward pass."""
        return self.activations + self.head

    @property
    def peak(self) -> int:
        """The most at a time."""
        return self.resident + max(self.rollouts, self.update)


def estimate_memory(
    model: PreTrainedModel | PeftModel,
    load: Load,
    *,
    quantization: BitsAndBytesConfig | None = None,
    compute_dtype: torch.dtype = torch.float32,
    checkpointing: bool = True,
    has_reference: bool = False,
    optimizer: str = "adamw_torch",
) -> MemoryEstimate:
    """The estimate for one process.

    Args:
        model: On the meta device, with its adapter; changed by this: its parameters are cast to `compute_dtype`.
        load: What it works on.
        quantization: Of the base.
        compute_dtype: What the update computes in: that of autocast, or else the base's own.
        checkpointing: Whether activations are recomputed.
        has_reference: Whether the reference is a copy of what trains.
        optimizer: `optim` of the config.
    """
    base = base_model_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    frozen = sum(_frozen_bytes(model, base, quantization))
    config: Any = base.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in trained)
    cache_dtype = compute_dtype.itemsize
    layer = _layer_bytes(base, compute_dtype)
    padded = load.micro_batch * (load.prompt_tokens + load.completion_tokens)
    packed = (
        math.ceil(load.micro_batch / load.num_generations) * load.prompt_tokens
        + load.micro_batch * load.completion_tokens
    )
    layers, inputs = config.num_hidden_layers, config.hidden_size * compute_dtype.itemsize
    own_tokens = math.ceil(load.completion_tokens / _CACHE_CHUNK) * _CACHE_CHUNK
    scored = load.micro_batch * load.completion_tokens
    return MemoryEstimate(
        base=frozen,
        trained=trained_bytes,
        gradients=trained_bytes,
        optimizer=int(trained_bytes * _states(optimizer)),
        reference=trained_bytes if has_reference else 0,
        cache=_cached_numbers(config)
        * cache_dtype
        * (load.prompts * load.prompt_tokens + load.completions * own_tokens),
        drawing=load.completions * config.vocab_size * _DRAW_BYTES,
        activations=int(padded * (layers * inputs + layer) if checkpointing else packed * layers * layer),
        head=scored * config.hidden_size * (compute_dtype.itemsize + 4),
        trainable_parameters=trainable,
        parameters=parameters,
    )


def meta_model(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal model of shapes without numbers, whatever its size."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return cast(PreTrainedModel, model)


def quantized_bytes(weight: torch.Tensor, quantization: BitsAndBytesConfig) -> int:
    """Bytes of one linear layer's weight, `(out, in)`, with its scales."""
    count = weight.numel()
    if quantization.load_in_8bit:
        return count + 4 * weight.shape[0]
    scales = math.ceil(count / _BLOCK)
    if not quantization.bnb_4bit_use_double_quant:
        return math.ceil(count / 2) + 4 * scales
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / _SCALES_BLOCK)


def _frozen_bytes(model: nn.Module, base: PreTrainedModel, quantization: BitsAndBytesConfig | None) -> Iterator[int]:
    quantized = {id(weight) for weight in _quantized_weights(base, quantization)}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            small = quantization is not None and id(parameter) in quantized
            yield quantized_bytes(parameter, cast(BitsAndBytesConfig, quantization)) if small else parameter.nbytes


def _quantized_weights(base: PreTrainedModel, quantization: BitsAndBytesConfig | None) -> Iterator[torch.Tensor]:
    """Weights of the linear layers but the LM head's, which transformers leaves as it is."""
    if quantization is None:
        return
    skipped = quantization.llm_int8_skip_modules or []
    head = base.get_output_embeddings()
    heads = {id(module) for module in (head.modules() if isinstance(head, nn.Module) else ())}
    for name, module in base.named_modules():
        linear = isinstance(module, nn.Linear) and id(module) not in heads and not module.weight.requires_grad
        if linear and not any(part in name for part in skipped):
            yield cast(nn.Linear, module).weight


def _cached_numbers(config: Any) -> int:
    """Keys and values of one token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    depth = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * depth)


def _states(optimizer: str) -> float:
    if "8bit" in optimizer:
        return 0.5
    return _STATES.get(optimizer, 2.0)


def _layer_bytes(base: PreTrainedModel, compute_dtype: torch.dtype) -> float:
    """Bytes that one layer keeps for its backward per token, counted in a forward pass on the meta device."""
    base.to(compute_dtype)  # type: ignore[arg-type]
    base.set_attn_implementation(_COUNTED_ATTENTION)
    base.train()
    (few, less), (many, more) = ((tokens, _kept_bytes(base, tokens)) for tokens in _PROBE_TOKENS)
    return (more - less) / (many - few) / base.config.get_text_config().num_hidden_layers


def _kept_bytes(base: PreTrainedModel, tokens: int) -> int:
    owned = {tensor.untyped_storage()._cdata for tensor in (*base.parameters(), *base.buffers())}
    kept: dict[int, torch.Tensor] = {}  # the tensors too, so that no storage takes the place of another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    place = torch.device("meta")
    ids = torch.zeros(1, tokens, dtype=torch.long, device=place)
    backbone = cast(Callable[..., Any], base.base_model)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = backbone(
            input_ids=ids, position_ids=ids, attention_mask=dummy_mask(place), use_cache=False, return_dict=True
        )
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _Attention(torch.autograd.Function):
    """What attention keeps: queries, keys and values of every head, and its output."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        out = torch.empty_like(query)
        ctx.save_for_backward(
            query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1), out
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError("shapes have no gradient")


def _counted_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`transformers.AttentionInterface`: `(1, heads, N, D)` -> `(1, N, heads, D)`, in memory linear in `N`."""
    return cast(torch.Tensor, _Attention.apply(query, key, value)).transpose(1, 2), None


AttentionInterface.register(_COUNTED_ATTENTION, _counted_attention)
AttentionMaskInterface.register(_COUNTED_ATTENTION, sdpa_mask)
