"""The importance ratio between the policy being trained and the policy that sampled."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .choices import Choices


def token_log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """log pi(o_t) - log pi_old(o_t), one ratio per token (GRPO, arXiv:2402.03300 §4.1.1) -> `(B, C)`."""
    return logps - old_logps


def sequence_log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """Mean over the completion's tokens of the token log-ratio, one ratio per completion -> `(B, 1)`.

    GSPO (arXiv:2507.18071 §4.1): the geometric mean of the token ratios, (pi(o) / pi_old(o)) ** (1 / |o|).
    """
    total = ((logps - old_logps) * mask).sum(dim=-1, keepdim=True)
    return total / mask.sum(dim=-1, keepdim=True).clamp(min=1)


IMPORTANCE_LEVELS: Choices[Callable[[Tensor, Tensor, Tensor], Tensor]] = Choices(
    "importance_sampling_level", {"token": token_log_ratio, "sequence": sequence_log_ratio}
)


def importance_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """exp of the log-ratio at the given level.

    Args:
        logps: `(B, C)`, log-probs of the completion's tokens under the policy being trained.
        old_logps: `(B, C)`, the same under the policy that sampled them.
        mask: `(B, C)`, 1 for tokens in the loss. Where it is 0 the token-level ratio is meaningless, not 1.
        level: `"token"` or `"sequence"`.

    Returns:
        `(B, C)` for `"token"`, `(B, 1)` for `"sequence"`, which broadcasts over the tokens.

    Raises:
        ValueError: If `level` is unknown.
    """
    return IMPORTANCE_LEVELS[level](logps, old_logps, mask).exp()
