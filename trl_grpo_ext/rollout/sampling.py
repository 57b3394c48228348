"""From logits to a token: penalties and filters, then the inverse CDF of the completion's own uniforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn; names, order and meaning are those of `transformers.GenerationConfig`."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    suppress_tokens: tuple[int, ...] = ()
    greedy: bool = False  # the most likely token, without noise
    logps_temperature: float | None = None  # temperature of the log-probs that are kept; None: `temperature`

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0; for the most likely token set greedy=True"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]; 1.0 keeps all tokens"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "None or in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1.0 is no penalty"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")


class TokenSampler:
    """Draws the next token of every live completion, and remembers its log-probability and which tokens were seen."""

    def __init__(self, params: SamplingParams, uniforms: torch.Tensor, prompt_ids: list[list[int]], vocab_size: int):
        """`uniforms` (B, C) float64 on the model's device; `prompt_ids` of the B completions."""
        self._params = params
        self._uniforms = uniforms
        warpers: list[TopKLogitsWarper | TopPLogitsWarper | MinPLogitsWarper] = []
        if params.top_k:
            warpers.append(TopKLogitsWarper(top_k=params.top_k))
        if params.top_p < 1:
            warpers.append(TopPLogitsWarper(top_p=params.top_p))
        if params.min_p:
            warpers.append(MinPLogitsWarper(min_p=params.min_p))
        self._warpers = warpers
        self._seen: torch.Tensor | None = None  # (B, V) tokens of prompt and completion so far
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(prompt_ids), vocab_size, dtype=torch.bool, device=uniforms.device)
            for row, ids in zip(self._seen, prompt_ids, strict=True):
                row[torch.tensor(ids, device=uniforms.device)] = True

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their log-probabilities for completions `rows` (b,), from `logits` (b, V), at token `position`.

        The log-probability is that of the whole temperature-scaled distribution, before penalties and filters: what the
        objective calls `old_logps`.
        """
        logits = logits.float()
        log_probs = _tempered(logits, self._params.temperature).log_softmax(dim=-1)  # (b, V)
        if self._params.greedy:
            tokens = self._filtered(logits, log_probs, rows).argmax(dim=-1)
        else:
            probs = self._filtered(logits, log_probs, rows).softmax(-1) if self._filters() else log_probs.exp()
            tokens = inverse_cdf(probs, self._uniforms[rows, position])
        if self._seen is not None:
            self._seen[rows, tokens] = True
        kept = self._params.logps_temperature
        if kept is not None and kept != self._params.temperature:
            log_probs = _tempered(logits, kept).log_softmax(dim=-1)
        return tokens, log_probs.gather(1, tokens[:, None])[:, 0]

    def _filters(self) -> bool:
        return bool(self._warpers or self._seen is not None or self._params.suppress_tokens)

    def _filtered(self, logits: torch.Tensor, log_probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not self._filters():
            return log_probs
        if self._seen is not None:
            penalty = self._params.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen[rows], penalised, logits)
        scores = logits / self._params.temperature
        if self._params.suppress_tokens:
            scores[:, list(self._params.suppress_tokens)] = -torch.inf
        no_ids = cast(torch.LongTensor, torch.empty(len(rows), 0, dtype=torch.long, device=rows.device))
        for warper in self._warpers:
            scores = warper(no_ids, scores)
        return scores


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1.0 else logits / temperature


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token whose slice of the cumulative distribution holds the uniform: `(b, V)`, `(b,)` in [0, 1) -> `(b,)`.

    Summed in float64: at a vocabulary of 150,000 a float32 sum would shave the tail. Tokens of probability 0 are never
    drawn. NaN gives the last token, which keeps the index valid: `GroupSampler` refuses the NaN when all is drawn.
    """
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
