"""What a base model says, and what it says with an adapter on it, drawn with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from datasets.utils import tqdm
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
from .data import EmptyPrompt, EncodedPrompt, Prompt, PromptEncoder
from .free_memory import pick_device
from .policy import CompletionScorer, base_model_of, context_limit, packing_problem
from .quantized import keep_quantized
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
    # Before anything is computed: bitsandbytes' own forward would change the layers in the first pass, a probe's too
    keep_quantized(model)
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
    origins: Sequence[str] | None = None,
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
        origins: What errors call each prompt ("prompts.jsonl, line 3"); by default "prompt 0", "prompt 1", ...

    Raises:
        ValueError: without an adapter where one is asked for, for a prompt that does not fit the model's context, and
            for messages without a chat template.
    """
    if which != "base" and policy.adapter is None:
        raise ValueError(f"which={which!r} needs an adapter: pass one, or which='base'")
    written: list[Prompt] = [as_message(prompt, policy.tokenizer, chat) for prompt in prompts]
    encoder = PromptEncoder(policy.tokenizer)
    encoded = encode_prompts(written, encoder, base_model_of(policy.model), params.max_new_tokens, origins)
    prompt_ids = [prompt.ids for prompt in encoded]
    sampler = group_sampler(policy.model, policy.tokenizer, params)
    found = [PromptSamples(prompt, {}) for prompt in written]
    for who in ("base", "adapter") if which == "both" else (which,):
        with speaking_as(who, policy.model):
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


def group_sampler(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, params: SamplingParams
) -> GroupSampler:
    """A sampler that shares prompts where the model can, which a probe finds out."""
    base = base_model_of(model)
    shared = use_group_attention(base) and packing_problem(base, CompletionScorer(base, params.temperature)) is None
    return GroupSampler(model, tokenizer, params, shared_prompts=shared)


@contextmanager
def speaking_as(who: str, model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """The model with its adapter off for "base", and as it is for "adapter"."""
    off = isinstance(model, PeftModel) and who == "base"
    with cast(PeftModel, model).disable_adapter() if off else nullcontext():
        yield


def encode_prompts(
    prompts: Sequence[Prompt],
    encoder: PromptEncoder,
    model: PreTrainedModel,
    completion: int,
    origins: Sequence[str] | None = None,
    progress: bool = True,
) -> list[EncodedPrompt]:
    """Prompts as token ids, each of which the model's context has room for.

    Args:
        prompts: Texts or lists of messages.
        encoder: Of the tokenizer.
        model: For its context.
        completion: Tokens that a completion may have.
        origins: What errors call each prompt; by default "prompt 0", "prompt 1", ...
        progress: Whether to show how far it is, on stderr, where it takes more than two seconds.

    Raises:
        ValueError: no prompts, one without tokens, one that is too long, or messages without a chat template.
    """
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to complete")
    context = context_limit(model)
    # Rotary positions go on beyond the context, a table of learned positions ends
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) is not None
    room = None if context is None else context - (1 if rotary else completion)
    encoded = []
    shown = tqdm(prompts, desc="reading prompts", delay=2, leave=False, disable=not progress)
    for number, prompt in enumerate(shown):
        name = f"prompt {number}" if origins is None else origins[number]
        if not isinstance(prompt, str) and encoder.tokenizer.chat_template is None:
            raise ValueError(f"{name} is a list of messages, and the tokenizer has no chat template: pass text")
        try:
            encoded.append(encoder.encode(prompt))
        except EmptyPrompt:
            raise ValueError(
                f"{name} has no tokens ({prompt!r:.80}): there is nothing to go on from. Write something, or leave "
                "it out."
            ) from None
        length = len(encoded[-1].ids)
        if room is not None and length > room:
            raise ValueError(
                f"{name} has {length} tokens, and the model's context of {context} has room for {room} "
                "beside a completion: shorten it" + ("." if rotary else f", or lower max_new_tokens={completion}.")
            )
    return encoded
