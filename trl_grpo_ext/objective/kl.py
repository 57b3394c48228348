"""How far the policy is from the reference: estimates from the sampled tokens, and the exact value."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .choices import Choices

# --- estimates of KL(pi || pi_ref) from the sampled token's log-probs: (B, C), (B, C) -> (B, C) ---
#
# J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html. All three estimate the same number
# for tokens drawn from pi. Differentiated as a loss, they do not estimate the same gradient (arXiv:2506.09477): on
# policy, the expected gradient of k1 is 0, that of k2 is the gradient of KL(pi || pi_ref), that of k3 is the gradient
# of the other direction, KL(pi_ref || pi). Multiplied by the importance ratio (`use_bias_correction_kl`), k1 and k3
# have the gradient of KL(pi || pi_ref), and k2 no longer has.


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased, high variance, negative for single tokens."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: biased, low variance, never negative."""
    return 0.5 * (logps - ref_logps).square()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1: unbiased, never negative; GRPO's (arXiv:2402.03300 eq. 4) and TRL's."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


KL_ESTIMATORS: Choices[Callable[[Tensor, Tensor], Tensor]] = Choices("kl_estimator", {"k1": k1, "k2": k2, "k3": k3})


def kl_penalised_rewards(rewards: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """KL as part of the reward instead of the loss (InstructGPT, arXiv:2203.02155 eq. 2; PPO style).

        r_i - beta sum_t m_it (log pi(o_it) - log pi_ref(o_it))

    The sum of k1 over the completion's tokens is log pi(o) - log pi_ref(o), so the policy gradient of this reward is
    that of KL(pi || pi_ref) over whole completions. No gradient flows through the penalty: it is a reward.

    Args:
        rewards: `(B,)`; NaN stays NaN.
        logps: `(B, C)`, of the policy that sampled.
        ref_logps: `(B, C)`.
        mask: `(B, C)`.
        beta: Weight of the penalty.

    Returns:
        `(B,)`.
    """
    per_token = torch.where(mask.bool(), k1(logps, ref_logps), 0.0)
    return rewards - beta * per_token.sum(dim=-1).detach()


def full_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    *,
    ref_head_weight: Tensor | None = None,
    ref_head_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """Exact KL(pi || pi_ref) at each position, over the whole vocabulary.

        sum_v pi(v) (log pi(v) - log pi_ref(v)),   pi = softmax(softcap(logit_scale (W h + b)) / temperature)

    with softcap(x) = c tanh(x / c), or x where there is no cap. Gradients flow to `hidden`, `head_weight` and
    `head_bias`; the reference is a constant. The gradient is that of the KL at the positions visited; how
    a token changes which positions come later is not part of it, here as in every KL per token in a loss
    (arXiv:2506.09477). `kl_penalised_rewards` accounts for that.

    Positions are taken `chunk_size` at a time, and a chunk's logits are computed again in the backward pass instead of
    being kept: no `(N, V)` tensor exists, only a few of `(chunk_size, V)` at a time. Computed in float32 (float64 if
    the inputs are), also under autocast: the KL is a small difference of large numbers, and bfloat16 logits would put
    a floor of noise under it.

    Args:
        hidden: `(N, H)`, the policy's last hidden states at the positions that predict a token of the loss.
        ref_hidden: `(N, H)`, the reference's.
        head_weight: `(V, H)`, the LM head.
        head_bias: `(V,)` or None.
        ref_head_weight: `(V, H)`, the reference's head where it differs; with it, `ref_head_bias` is used as given.
            None means the policy's head, weight and bias, without gradient.
        ref_head_bias: `(V,)` or None. Needs `ref_head_weight`.
        temperature: Sampling temperature; the log-probs of the loss are of the same scaled distribution.
        logit_scale: Factor some architectures put on the logits.
        final_logit_softcapping: Cap some architectures put on the logits, or None.
        chunk_size: Positions at a time.

    Returns:
        `(N,)`, float32 or float64.

    Raises:
        ValueError: If `temperature` or `chunk_size` is not positive, the hidden states' shapes differ, or
            `ref_head_bias` comes without `ref_head_weight`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0: the logits are divided by it. Raise it.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1: it is a number of positions. Raise it.")
    if hidden.dim() != 2 or hidden.shape != ref_hidden.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and ref_hidden {tuple(ref_hidden.shape)}: both must be the same "
            "(N, H). Select the same positions from both passes."
        )
    if ref_head_weight is None:
        if ref_head_bias is not None:
            raise ValueError("ref_head_bias needs ref_head_weight: a reference head is a weight and a bias. Pass both.")
        ref_head_weight, ref_head_bias = head_weight, head_bias

    policy = _Head(head_weight, head_bias, temperature, logit_scale, final_logit_softcapping)
    reference = _Head(ref_head_weight, ref_head_bias, temperature, logit_scale, final_logit_softcapping)
    chunks: list[Tensor] = [
        # Nothing in a chunk is random, so there is no RNG state to keep.
        checkpoint(_chunk_kl, states, refs, policy, reference, use_reentrant=False, preserve_rng_state=False)
        for states, refs in zip(hidden.split(chunk_size), ref_hidden.split(chunk_size), strict=True)
    ]
    return torch.cat(chunks)


class _Head(NamedTuple):
    """An LM head and what is done to its logits."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None

    def log_probs(self, hidden: Tensor) -> Tensor:  # (n, H) -> (n, V)
        """Of the whole vocabulary, in float32 or wider."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = F.linear(hidden.to(dtype), self.weight.to(dtype), bias) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.log_softmax(logits / self.temperature, dim=-1)


def _chunk_kl(hidden: Tensor, ref_hidden: Tensor, policy: _Head, reference: _Head) -> Tensor:  # (n, H) -> (n,)
    with torch.autocast(hidden.device.type, enabled=False):
        with torch.no_grad():
            ref_logps = reference.log_probs(ref_hidden)
        logps = policy.log_probs(hidden)
        return (logps.exp() * (logps - ref_logps)).sum(dim=-1)
