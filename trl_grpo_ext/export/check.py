"""Do two models give the same log-probabilities? Measured on a few prompts, each continued greedily by the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from ..policy import base_model_of

# When no prompts are given: of several kinds, so that most of what an adapter does shows somewhere
SAMPLE_PROMPTS = (
    "What is 17 + 25? Think step by step, and put the final answer in \\boxed{}.",
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many did she sell in all?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List three causes of the First World War.",
    "Traduis en français : The weather is nice today.",
    "The quick brown fox jumps over the lazy dog.",
)


@dataclass(frozen=True, slots=True)
class TextScores:
    """One text's log-probabilities; token 0 has none."""

    logps: torch.Tensor  # (N - 1,) float32, on the CPU
    likeliest: torch.Tensor  # (N - 1,) the most likely token at each place


@dataclass(frozen=True, slots=True)
class LogpDifference:
    """How far two models' log-probabilities of the same tokens are apart."""

    max: float
    mean: float
    tokens: int
    same_likeliest: float  # share of places where both would choose the same token


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel | PeftModel, prompt_ids: Sequence[Sequence[int]], tokens: int
) -> list[list[int]]:
    """Each prompt with up to `tokens` of the model's most likely tokens behind it."""
    if not tokens:
        return [list(ids) for ids in prompt_ids]
    eos: Any = getattr(base_model_of(model).generation_config, "eos_token_id", None)
    pad = eos[0] if isinstance(eos, list) else eos
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad or 0, disable_compile=True
    )
    texts = []
    for ids in prompt_ids:
        rows = torch.tensor([list(ids)], device=model.device)
        output = cast(Any, model).generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), generation_config=config
        )
        texts.append(output[0].tolist())
    return texts


@torch.no_grad()
def score_texts(model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[int]]) -> list[TextScores]:
    """Log-probabilities of each text's tokens, one text at a time: no padding that could differ."""
    scores = []
    for ids in texts:
        row = torch.tensor([list(ids)], device=model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()  # (N - 1, V)
        logps = logits.log_softmax(dim=-1).gather(1, row[0, 1:, None])[:, 0]
        scores.append(TextScores(logps.cpu(), logits.argmax(dim=-1).cpu()))
    return scores


def compare(ours: Sequence[TextScores], theirs: Sequence[TextScores]) -> LogpDifference:
    """Largest and mean absolute difference over all tokens of all texts.

    Raises:
        FloatingPointError: if one of them is NaN.
    """
    difference = torch.cat([(a.logps - b.logps).abs() for a, b in zip(ours, theirs, strict=True)])
    if bool(difference.isnan().any()):
        raise FloatingPointError("the log-probabilities of the sample prompts are NaN: the weights are damaged")
    same = torch.cat([a.likeliest == b.likeliest for a, b in zip(ours, theirs, strict=True)])
    return LogpDifference(
        float(difference.max()), float(difference.double().mean()), len(difference), float(same.double().mean())
    )
