"""What a base model says, and what it says with an adapter on it, drawn with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from .adapter_source import (
    DTYPES,
    LOAD_ERRORS,
    first_line,
    load_adapter,
    load_tokenizer,
    quantization_of,
    read_adapter,
    read_base_config,
)
from .attention import use_group_attention
from .data import Prompt, PromptEncoder
from .free_memory import pick_device
from .policy import CompletionScorer, base_model_of, context_limit, packing_problem
from .rollout import GroupSampler, SamplingParams

QUANTIZED = ("nf4", "fp4", "int8")
Which = Literal["base", "adapter", "both"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion."""

    text: str
    tokens: int
    finish_reason: str  # "eos" or "length"
    logp: float  # sum of its tokens' log-probabilities under the model that drew it, at the sampling temperature


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """One prompt's completions, by who drew them: "base", "adapter", or both."""

    prompt: Prompt
    samples: dict[str, list[Sample]]  # G each


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A base model, perhaps with an adapter on it."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    adapter: str | None


def load_policy(
    base: str | None,
    adapter: str | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> LoadedPolicy:
    """Load a base, an adapter on it, and the tokenizer (the adapter's if it has one), for inference.

    Args:
        base: Folder or Hub id; None: the one that the adapter's config names.
        adapter: Folder or Hub id.
        revision: Of the base.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        quantize: "nf4", "fp4" or "int8" (bitsandbytes); None leaves the base as it is stored.
        device: By default the GPU if there is one, else the CPU.

    Raises:
        ValueError: for what is not there, or does not fit together.
    """
    if base is None and adapter is None:
        raise ValueError("model and adapter are both missing: pass at least one of them")
    source = None if adapter is None else read_adapter(adapter, base, revision)
    name, at = (source.base, source.base_revision) if source is not None else (cast(str, base), revision)
    config = read_base_config(name, at, trust_remote_code)
    stored = quantization_of(config)
    if stored and quantize:
        raise ValueError(f"quantize={quantize!r}, but {name!r} is stored quantized already ({stored}): leave it out")
    tokenizer = load_tokenizer(source, name, at, trust_remote_code)
    place = pick_device(device)
    stored_dtype = cast(torch.dtype, config.dtype or config.get_text_config().dtype or torch.float32)
    try:
        model: PreTrainedModel | PeftModel = AutoModelForCausalLM.from_pretrained(
            name,
            revision=at,
            dtype=DTYPES.get(dtype, "auto"),
            quantization_config=None if quantize is None else quantization(quantize, DTYPES.get(dtype, stored_dtype)),
            device_map=None if place.type == "cpu" and not quantize else {"": place},
            trust_remote_code=trust_remote_code,
        )
    except LOAD_ERRORS as error:
        raise ValueError(f"model={name!r} cannot be loaded: {first_line(error)}") from error
    if source is not None:
        model = load_adapter(cast(PreTrainedModel, model), source)
    model.eval()
    return LoadedPolicy(model, tokenizer, name, adapter)


def quantization(kind: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings for "nf4", "fp4" or "int8".

    Raises:
        ValueError: for another kind.
    """
    if kind not in QUANTIZED:
        raise ValueError(f"quantize={kind!r} must be one of {list(QUANTIZED)}")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def sample_side_by_side(
    policy: LoadedPolicy,
    prompts: Sequence[Prompt],
    which: Which,
    params: SamplingParams,
    *,
    num_generations: int = 1,
    seed: int = 0,
    chat: bool = True,
) -> list[PromptSamples]:
    """Draw completions from the base, from base + adapter, or from both with the same noise.

    Args:
        policy: What `load_policy` returned.
        prompts: Texts or lists of messages.
        which: "base", "adapter" or "both".
        params: Sampling parameters.
        num_generations: G, completions per prompt and model.
        seed: Key of the noise: completion g of prompt p draws the stream `(seed, 0, p, g)`, whoever draws.
        chat: Write texts as a user's message in the tokenizer's chat template, if it has one.

    Raises:
        ValueError: without an adapter where one is asked for, for a prompt that does not fit the model's context, and
            for messages without a chat template.
    """
    if which != "base" and policy.adapter is None:
        raise ValueError(f"which={which!r} needs an adapter: pass one, or which='base'")
    written: list[Prompt] = [as_message(prompt, policy.tokenizer, chat) for prompt in prompts]
    base = base_model_of(policy.model)
    prompt_ids = _encode(written, policy.tokenizer, base, params.max_new_tokens)
    shared = use_group_attention(base) and packing_problem(base, CompletionScorer(base, params.temperature)) is None
    sampler = GroupSampler(policy.model, policy.tokenizer, params, shared_prompts=shared)
    found = [PromptSamples(prompt, {}) for prompt in written]
    for who in ("base", "adapter") if which == "both" else (which,):
        off = isinstance(policy.model, PeftModel) and who == "base"
        with cast(PeftModel, policy.model).disable_adapter() if off else nullcontext():
            rollouts = sampler.generate(prompt_ids, num_generations, seed=seed)
        texts = policy.tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
        samples = [
            Sample(text, length, reason, float(logps.sum(dtype=torch.float64)))
            for text, length, reason, logps in zip(
                texts, rollouts.lengths, rollouts.finish_reasons, rollouts.logps, strict=True
            )
        ]
        for number, row in enumerate(found):
            row.samples[who] = samples[number * num_generations : (number + 1) * num_generations]
    return found


def as_message(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Prompt:
    """A text as a user's message, if `chat` and the tokenizer has a template; anything else as it is."""
    if isinstance(prompt, str) and chat and tokenizer.chat_template is not None:
        return [{"role": "user", "content": prompt}]
    return prompt


def _encode(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, completion: int
) -> list[list[int]]:
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to complete")
    encoder = PromptEncoder(tokenizer)
    context = context_limit(model)
    # Rotary positions go on beyond the context, a table of learned positions ends
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) is not None
    ids = []
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and tokenizer.chat_template is None:
            raise ValueError(
                f"prompt {number} is a list of messages, and the tokenizer has no chat template: pass text"
            )
        ids.append(encoder.encode(prompt).ids)
        room = None if context is None else context - (1 if rotary else completion)
        if room is not None and len(ids[-1]) > room:
            raise ValueError(
                f"prompt {number} has {len(ids[-1])} tokens, and the model's context of {context} has room for {room} "
                "beside a completion: shorten it" + ("." if rotary else f", or lower max_new_tokens={completion}.")
            )
    return ids
