"""The GRPO loss of a micro-batch, composed from the other modules of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .aggregation import AGGREGATIONS, StepNormalizer
from .kl import KL_ESTIMATORS
from .ratio import importance_ratio
from .surrogate import clip_indicators, clipped_surrogate


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss and what is worth logging about it; everything but `loss` is detached.

    Args:
        loss: Scalar; this micro-batch's share of the optimizer step's loss.
        per_token_kl: `(B, C)`, the KL term as it enters the loss (after the bias correction, as in TRL's metric `kl`),
            without beta; 0 off the mask. None if beta is 0.
        is_low_clipped: Bool, `(B, C)`; `(B, 1)` at sequence level.
        is_high_clipped: Likewise.
        ratio: `(B, C)` or `(B, 1)`, before clipping and before `delta`; 1 off the mask.
    """

    loss: Tensor
    per_token_kl: Tensor | None
    is_low_clipped: Tensor
    is_high_clipped: Tensor
    ratio: Tensor


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    norm: StepNormalizer,
    ref_logps: Tensor | None = None,
    per_token_kl: Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    level: str = "token",
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = True,
    aggregation: str = "dapo",
) -> LossTerms:
    """GRPO (arXiv:2402.03300 §4.1.1): clipped surrogate plus beta times KL, aggregated over the optimizer step.

        l_it = -min(ratio A, clip(ratio) A) + beta KL_it,   loss = aggregation(l, mask)

    `use_bias_correction_kl` multiplies the KL estimate by the (undetached, unclipped) importance ratio, as TRL does by
    default (DeepSeek-V3.2, arXiv:2512.02556). Where the ratio is 1 this leaves the value alone but not the gradient:
    KL grad(log pi) is added, which turns k3's expected gradient from that of KL(pi_ref || pi) into that of
    KL(pi || pi_ref). With `level="sequence"` every token's KL is multiplied by its completion's one ratio, as in TRL.
    It does not apply to `kl_estimator="full"`: there the expectation over the token is exact, so there is no bias to
    correct, and the product would only add noise to the gradient.

    Args:
        logps: `(B, C)`, log-probs of the completions' tokens, with gradient.
        old_logps: `(B, C)`, those of the policy that sampled; `logps.detach()` on the first pass over fresh rollouts.
        advantages: `(B,)` or `(B, C)`.
        mask: `(B, C)`, 1 (or True) for tokens in the loss. Off the mask, finite or not, no value has any effect.
        norm: The optimizer step's sizes.
        ref_logps: `(B, C)`, the reference's; needed if beta is not 0, except for `kl_estimator="full"`.
        per_token_kl: `(B, C)`, with gradient, from `full_kl`; needed for `kl_estimator="full"`, and only there.
        beta: Weight of the KL term; at 0 it is not computed.
        epsilon_low: Room below a ratio of 1.
        epsilon_high: Room above it.
        delta: Bound of two-sided clipping, or None.
        level: Key of `IMPORTANCE_LEVELS`.
        kl_estimator: Key of `KL_ESTIMATORS`, or `"full"`.
        use_bias_correction_kl: See above.
        aggregation: Key of `AGGREGATIONS`.

    Raises:
        ValueError: If a name is unknown, or beta is not 0 and what the estimator needs is missing, or `per_token_kl`
            comes with an estimator that would not use it.
    """
    # What padding holds is the caller's business, -inf included. It must go before any arithmetic: multiplying by the
    # mask at the end leaves 0 * inf = NaN, in the loss or, past torch.where, in its gradient.
    in_loss = mask.bool()
    logps, old_logps = _zero_off_mask(logps, in_loss), _zero_off_mask(old_logps, in_loss)

    ratio = importance_ratio(logps, old_logps, in_loss, level)
    per_token_loss = clipped_surrogate(
        ratio, advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta
    )
    kl = None
    if beta != 0.0:
        kl = _kl_term(logps, ref_logps, per_token_kl, ratio, in_loss, kl_estimator, use_bias_correction_kl)
        per_token_loss = per_token_loss + beta * kl

    clipped = clip_indicators(
        ratio.detach(), advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high, delta=delta
    )
    return LossTerms(
        loss=AGGREGATIONS[aggregation](per_token_loss, in_loss, norm),
        per_token_kl=None if kl is None else kl.detach(),
        is_low_clipped=clipped.low,
        is_high_clipped=clipped.high,
        ratio=ratio.detach(),
    )


def _kl_term(
    logps: Tensor,
    ref_logps: Tensor | None,
    per_token_kl: Tensor | None,
    ratio: Tensor,
    mask: Tensor,
    kl_estimator: str,
    use_bias_correction_kl: bool,
) -> Tensor:
    """The KL per token (B, C) that beta multiplies: the given exact one, or an estimate, corrected if asked for."""
    if (kl_estimator == "full") != (per_token_kl is not None):
        raise ValueError(
            f"per_token_kl is {'missing' if per_token_kl is None else 'given'} with kl_estimator={kl_estimator!r}: the "
            "exact KL goes with kl_estimator='full' and with no other. Pass it there, and ref_logps for the estimators."
        )
    if per_token_kl is not None:
        return _zero_off_mask(per_token_kl, mask)
    if ref_logps is None:
        raise ValueError(
            f"ref_logps is missing with kl_estimator={kl_estimator!r}: the KL is estimated from the reference's "
            "log-probs when beta is not 0. Pass them, or set beta=0."
        )
    kl = KL_ESTIMATORS[kl_estimator](logps, _zero_off_mask(ref_logps, mask))
    return kl * ratio if use_bias_correction_kl else kl


def _zero_off_mask(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0)
