"""Log-probabilities of completions under a model: packed (fast) and padded (the reference implementation).

Both run TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`), which projects hidden states tile by tile and
never holds `(N, vocab)` logits. A hook on the backbone keeps only the hidden states that are scored, so that the head
never sees a prompt's positions, and leaves the kept ones where the exact KL can find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from ..attention import dummy_mask
from ..objective import full_kl
from .head import effective_head, head_in_place, with_adapter
from .packing import PackedRow


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per-token results for `S` completions, zero at padding."""

    logps: torch.Tensor  # (S, C) log-probability of each completion token, of the temperature-scaled distribution
    entropy: torch.Tensor | None  # (S, C)
    mask: torch.Tensor  # (S, C) True at completion tokens
    # (T, H) last hidden states of the scored positions, completion after completion; (T, H + r) with an adapter of
    # rank r on the LM head, see `head.py`
    hidden: torch.Tensor


class CompletionScorer:
    """Scores completions with one model; made once per model, before or after PEFT wraps it.

    The model handed to `packed` and `padded` is whatever wraps the scored one (PEFT, DDP), so that their hooks run.
    """

    def __init__(self, base_model: PreTrainedModel, temperature: float) -> None:
        add_fused_lm_head(base_model, temperature=temperature, outputs=("log_probs", "entropy"))
        base_model.base_model.register_forward_hook(self._keep_scored)
        self._base_model = base_model
        self._scored: torch.Tensor | None = None  # (T,) into the flattened batch, while one of our calls runs
        self._hidden: torch.Tensor | None = None

    def packed(self, model: nn.Module, row: PackedRow) -> TokenScores:
        """Scores of a packed row's completions, in the row's order. Needs `use_group_attention(base_model)`."""
        inputs = {
            "input_ids": row.input_ids,
            "position_ids": row.position_ids,
            "attention_mask": dummy_mask(row.input_ids.device),
            "group_layout": row.layout,
        }
        return self._score(model, inputs, row.layout.scored, row.labels, row.lengths)

    def padded(
        self,
        model: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        pad_token_id: int,
        device: torch.device,
    ) -> TokenScores:
        """The same for `S` prompt-completion pairs as rows padded on the right: slow, right for any architecture."""
        pairs = list(zip(prompt_ids, completion_ids, strict=True))
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        ids = torch.full((len(pairs), longest), pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(pairs), longest, dtype=torch.long)
        scored: list[torch.Tensor] = []
        labels: list[int] = []
        for i, (prompt, completion) in enumerate(pairs):
            total = len(prompt) + len(completion)
            ids[i, :total] = torch.tensor([*prompt, *completion])
            mask[i, :total] = 1
            first = i * longest + len(prompt) - 1
            scored.append(torch.arange(first, first + len(completion)))
            labels += completion
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        lengths = torch.tensor([len(completion) for completion in completion_ids], device=device)
        return self._score(model, inputs, torch.cat(scored).to(device), torch.tensor([labels], device=device), lengths)

    def _score(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        scored: torch.Tensor,
        labels: torch.Tensor,
        lengths: torch.Tensor,
    ) -> TokenScores:
        self._scored = scored
        try:
            with head_in_place(self._base_model):
                output = model(**inputs, shift_labels=labels, fused_lm_head=True, use_cache=False)
            hidden = self._hidden
        finally:
            self._scored = self._hidden = None
        assert hidden is not None, "the backbone's forward hook did not run"
        return TokenScores(
            logps=unpack(output.log_probs, lengths),
            entropy=None if output.entropy is None else unpack(output.entropy.detach(), lengths),
            mask=completion_mask(lengths),
            hidden=hidden,
        )

    def _keep_scored(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._scored is not None:
            kept = output.last_hidden_state.flatten(0, 1).index_select(0, self._scored)
            kept = with_adapter(self._base_model, kept)
            output.last_hidden_state = kept[None]
            self._hidden = kept
        return output


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How a model turns hidden states into logits, read the way TRL's fused LM head reads it."""

    weight: torch.Tensor  # (V, H), or (V, H + r) with an adapter of rank r
    bias: torch.Tensor | None  # (V,)
    logit_scale: float
    final_logit_softcapping: float | None

    def detached(self) -> HeadSpec:
        """The same values outside autograd, and still those after a snapshot's parameters are exchanged back."""
        return replace(self, weight=self.weight.data, bias=None if self.bias is None else self.bias.data)


def head_spec(base_model: PreTrainedModel) -> HeadSpec:
    """The LM head's parameters as they are now, and the transformations after it."""
    config = base_model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    head = effective_head(base_model)
    softcapping = getattr(config, "final_logit_softcapping", None)
    return HeadSpec(head.weight, head.bias, scale, softcapping)


def exact_kl(
    scores: TokenScores, ref_hidden: torch.Tensor, head: HeadSpec, ref_head: HeadSpec, temperature: float
) -> torch.Tensor:
    """`(S, C)` KL of the whole distributions from the `(T, H)` hidden states of policy and reference; see `full_kl`."""
    kl = full_kl(
        scores.hidden,
        ref_hidden,
        head.weight,
        head.bias,
        ref_head_weight=ref_head.weight,
        ref_head_bias=ref_head.bias,
        temperature=temperature,
        logit_scale=head.logit_scale,
        final_logit_softcapping=head.final_logit_softcapping,
    )
    return unpack(kl, scores.mask.sum(dim=1))


def completion_mask(lengths: torch.Tensor) -> torch.Tensor:
    """`(S,)` lengths -> `(S, C)`, True at real tokens."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def unpack(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Values of the scored positions, `(T,)` or `(1, T)`, as rows `(S, C)` with zeros on the right."""
    mask = completion_mask(lengths)
    return values.new_zeros(mask.shape).masked_scatter(mask, values.reshape(-1))
