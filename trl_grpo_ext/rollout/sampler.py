"""The rollout engine: prompts in, groups of completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..attention import UnsupportedAttention, local_attention, use_group_attention
from ..decoding import thin_products
from ..evaluating import evaluating
from ..fused import fuse_layers
from .decoder import SharedPromptDecoder
from .noise import uniform_rows
from .rollouts import Rollouts
from .sampling import SamplingParams, TokenSampler

# On a GPU, asking which completions have ended waits for the device: ask every few tokens
_CHECK_EVERY = {"cpu": 1}
_CHECK_EVERY_ELSEWHERE = 8


class GroupSampler:
    """Samples groups of completions from a causal language model, with or without an adapter on it.

    Usable without the trainer:

        sampler = GroupSampler(model, tokenizer)
        rollouts = sampler.generate(tokenizer(["2+2="])["input_ids"], num_generations=8, max_new_tokens=64)
        texts = tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)

    Args:
        model: A `PreTrainedModel` or a `PeftModel` around one. A model on SDPA is switched to the package's attention
            function, which is plain SDPA to everybody else.
        tokenizer: For its EOS and padding ids. Every EOS id of the model's generation config ends a completion too.
        params: Default sampling parameters; `generate` can override each.
        shared_prompts: False decodes with `model.generate`, one row per completion, for architectures that cannot share
            a prompt's keys and values. The noise, and so the completions, are the same.
        max_rows: Completions decoded at once (None: all of a call). Splitting changes memory and speed, not results.
        dequantize: Of a base in 4 or 8 bits. "layer": each layer is dequantized whenever it is called. "resident": once
            per `generate`, which is faster and takes the memory of the unquantized weights while it runs.

    Raises:
        ValueError: for an unknown `dequantize`, if neither tokenizer nor model has an EOS id, or the model cannot share
            prompts: it is not on SDPA, or its tokens do not see all that came before them (`UnsupportedAttention`).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams | None = None,
        *,
        shared_prompts: bool = True,
        max_rows: int | None = None,
        dequantize: str = "layer",
    ) -> None:
        if dequantize not in ("layer", "resident"):
            raise ValueError(f"dequantize={dequantize!r} must be 'layer' or 'resident'")
        base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        if shared_prompts and not use_group_attention(base):
            raise ValueError(
                f"attn_implementation={base.config._attn_implementation!r}: sharing prompts needs 'sdpa'. Load the "
                "model with attn_implementation='sdpa', or pass shared_prompts=False."
            )
        local = local_attention(base) if shared_prompts else None
        if local is not None:
            raise UnsupportedAttention(f"the model cannot share prompts: {local}. Pass shared_prompts=False.")
        fuse_layers(base)
        self.model = base
        self.params = params or SamplingParams()
        self.eos_token_ids = eos_token_ids(base, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_ids[0] if pad is None else pad
        self.shared_prompts = shared_prompts
        self.max_rows = max_rows
        self.dequantize = dequantize

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        num_generations: int,
        *,
        seed: int = 0,
        step: int = 0,
        first_prompt_index: int = 0,
        prompt_indices: Sequence[int] | None = None,
        first_completion_index: int = 0,
        **overrides: Any,
    ) -> Rollouts:
        """Draw `num_generations` completions for each prompt.

        Args:
            prompt_ids: P prompts as token ids, each with at least one token.
            num_generations: G.
            seed, step, first_prompt_index: Key of the noise: completion g of prompt p draws the stream
                `(seed, step, first_prompt_index + p, g)`, whatever else is in the batch.
            prompt_indices: P numbers to use instead of `first_prompt_index + p`.
            first_completion_index: Number of the first completion of each prompt. A second call that begins where the
                first one ended draws what one call for all of them would have drawn.
            overrides: Fields of `SamplingParams`.

        Returns:
            `Rollouts` of `P * G` completions, a prompt's next to each other.

        Raises:
            ValueError: for no prompts, an empty prompt, `num_generations` below 1, `prompt_indices` of another length
                or a bad sampling parameter.
            FloatingPointError: if the model's logits are NaN: its weights have diverged, or overflowed.
        """
        params = replace(self.params, **overrides)
        if num_generations < 1:
            raise ValueError(f"num_generations={num_generations} must be at least 1")
        if not prompt_ids:
            raise ValueError("prompt_ids is empty: there is nothing to complete")
        for index, ids in enumerate(prompt_ids):
            if not ids:
                raise ValueError(
                    f"prompt_ids[{index}] has no tokens; a prompt needs at least one (a BOS token will do)"
                )
        prompts = [list(ids) for ids in prompt_ids]
        indices = range(first_prompt_index, first_prompt_index + len(prompts))
        numbers = list(indices if prompt_indices is None else prompt_indices)
        if len(numbers) != len(prompts):
            raise ValueError(f"prompt_indices has {len(numbers)} numbers for {len(prompts)} prompts: give one for each")
        size = len(prompts) if self.max_rows is None else max(1, self.max_rows // num_generations)
        completions: list[list[int]] = []
        logps: list[torch.Tensor] = []
        with evaluating(self.model), thin_products(self.model, self.dequantize):
            for start in range(0, len(prompts), size):
                part = prompts[start : start + size]
                streams = [
                    (p, first_completion_index + g)
                    for p in numbers[start : start + size]
                    for g in range(num_generations)
                ]
                noise = self._noise(params, seed, step, streams)
                decode = self._decode_shared if self.shared_prompts else self._decode_rows
                part_completions, part_logps = decode(part, num_generations, params, noise)
                completions += part_completions
                logps += part_logps.unbind()
        diverged = [i // num_generations for i, row in enumerate(logps) if bool(row.isnan().any())]
        if diverged:
            raise FloatingPointError(
                f"the model's logits are NaN for {len(diverged)} of {len(completions)} completions, the first of "
                f"prompt {diverged[0]}: its weights have diverged or overflowed, and nothing can be sampled. Lower the "
                "learning rate, clip gradients (max_grad_norm), or use bfloat16 instead of float16."
            )
        eos = set(self.eos_token_ids)
        return Rollouts(
            prompt_ids=prompts,
            completion_ids=completions,
            logps=nn.utils.rnn.pad_sequence([row[: len(c)] for row, c in zip(logps, completions, strict=True)], True),
            finish_reasons=["eos" if ids[-1] in eos else "length" for ids in completions],
            num_generations=num_generations,
        )

    def _noise(self, params: SamplingParams, seed: int, step: int, streams: Sequence[tuple[int, int]]) -> torch.Tensor:
        if params.greedy:
            return torch.empty(len(streams), 0, device=self.model.device)
        prompts, completions = zip(*streams, strict=True)
        return uniform_rows(seed, step, prompts, completions, params.max_new_tokens).to(self.model.device)

    def _decode_shared(
        self, prompts: list[list[int]], num_generations: int, params: SamplingParams, noise: torch.Tensor
    ) -> tuple[list[list[int]], torch.Tensor]:
        device = self.model.device
        decoder = SharedPromptDecoder(self.model, prompts, num_generations)
        logits = decoder.first_logits.repeat_interleave(num_generations, dim=0)
        repeated = [ids for ids in prompts for _ in range(num_generations)]
        sampler = TokenSampler(params, noise, repeated, logits.shape[-1])
        count = len(repeated)
        ids = torch.zeros(count, params.max_new_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(count, params.max_new_tokens, device=device)
        eos = torch.tensor(self.eos_token_ids, device=device)
        every = _CHECK_EVERY.get(device.type, _CHECK_EVERY_ELSEWHERE)
        rows = decoder.rows.to(device)
        finished = torch.zeros(count, dtype=torch.bool, device=device)
        for position in range(params.max_new_tokens):
            tokens, token_logps = sampler.draw(logits, rows, position)
            ids[rows, position] = tokens
            logps[rows, position] = token_logps
            finished |= torch.isin(tokens, eos)
            if (position + 1) % every == 0 and bool(finished.any()):
                keep = [slot for slot, done in enumerate(finished.tolist()) if not done]
                if not keep:
                    break
                ended = finished.nonzero()[:, 0].tolist()
                before = decoder.rows.tolist()
                decoder.drop(ended)
                rows = decoder.rows.to(device)
                slots = {row: slot for slot, row in enumerate(before)}
                tokens = tokens[[slots[row] for row in decoder.rows.tolist()]]
                finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
            if position + 1 < params.max_new_tokens:
                logits = decoder.step(tokens)
        return self._cut(ids), logps.cpu()

    def _decode_rows(
        self, prompts: list[list[int]], num_generations: int, params: SamplingParams, noise: torch.Tensor
    ) -> tuple[list[list[int]], torch.Tensor]:
        """`model.generate` on one row per completion, with our draws: its argmax is told what we drew."""
        repeated = [ids for ids in prompts for _ in range(num_generations)]
        longest = max(map(len, repeated))
        padded = torch.tensor([[self.pad_token_id] * (longest - len(ids)) + ids for ids in repeated])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in repeated])
        draws = _Draws(params, noise, repeated, longest)
        config = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=False,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
        )
        kept, self.model.generation_config = self.model.generation_config, config
        try:
            output = cast(Any, self.model).generate(  # of GenerationMixin, which causal models have
                input_ids=padded.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draws]),
                disable_compile=True,
            )
        finally:
            self.model.generation_config = kept
        logps = torch.stack(draws.logps, dim=1).cpu()
        return self._cut(output[:, longest:]), logps

    def _cut(self, ids: torch.Tensor) -> list[list[int]]:
        """Each row up to and including its first EOS."""
        eos = set(self.eos_token_ids)
        completions = []
        for row in ids.tolist():
            end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
            completions.append(row[: end + 1])
        return completions


class _Draws(LogitsProcessor):
    """Makes `generate`'s argmax pick the token that our sampler drew."""

    def __init__(self, params: SamplingParams, noise: torch.Tensor, prompt_ids: list[list[int]], prompt_width: int):
        self._params, self._noise, self._prompt_ids, self._width = params, noise, prompt_ids, prompt_width
        self._sampler: TokenSampler | None = None
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._sampler is None:
            self._sampler = TokenSampler(self._params, self._noise, self._prompt_ids, scores.shape[-1])
        rows = torch.arange(len(scores), device=scores.device)
        tokens, logps = self._sampler.draw(scores, rows, input_ids.shape[1] - self._width)
        self.logps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS and those of the model's generation config.

    Raises:
        ValueError: if there is none.
    """
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.insert(0, tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            "eos_token=None: neither the tokenizer nor the model's generation config has an end-of-sequence token, so "
            "no completion could end. Set tokenizer.eos_token."
        )
    return ids
