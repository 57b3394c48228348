"""When the reference follows the policy: `sync_ref_model`, as in TRL, and the rounds of iterative GRPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import GRPOConfig
from .metrics import MetricLog
from .policy import AdapterOff, LivingReference, Snapshot, make_reference


def start_reference(
    model: nn.Module, args: GRPOConfig, metrics: MetricLog, add_callback: Callable[[TrainerCallback], None]
) -> AdapterOff | Snapshot | LivingReference:
    """The reference that the config asks for; one that is to follow the policy does so after optimizer steps."""
    if not args.sync_ref_model and args.reference_rounds == 1:
        return make_reference(model)
    reference = LivingReference(model, mixes=args.sync_ref_model and args.ref_model_mixup_alpha < 1)
    add_callback(SyncReference(reference, metrics))
    return reference


def last_sync(args: GRPOConfig, max_steps: int, step: int) -> int:
    """The last optimizer step up to `step` after which the reference is set; 0 if there is none.

    With `sync_ref_model`: every `ref_model_sync_steps`. With `reference_rounds=R`: after `max_steps * k / R` for
    k = 1..R-1, which begins round k + 1 (DeepSeekMath, arXiv:2402.03300, Algorithm 1, line 3).
    """
    if args.sync_ref_model:
        return step - step % args.ref_model_sync_steps
    rounds = args.reference_rounds
    return max((end for k in range(1, rounds) if (end := max_steps * k // rounds) <= step), default=0)


class SyncReference(TrainerCallback):
    """Syncs the reference after the steps that are due, and logs `reference/age`, in optimizer steps since.

    Log-probs of the reference that a generation has already got stay as they are, as in TRL: what was sampled before a
    sync is compared with the reference of then. `kl_estimator="full"` keeps none, and takes the new one at once.
    """

    def __init__(self, reference: LivingReference, metrics: MetricLog) -> None:
        self._reference, self._metrics = reference, metrics

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # type: ignore[override]
        """Now the number of steps is known.

        Raises:
            ValueError: if there are more rounds than optimizer steps.
        """
        if args.reference_rounds > state.max_steps:
            raise ValueError(
                f"reference_rounds={args.reference_rounds} must be at most {state.max_steps}, the optimizer steps of "
                "this training: a round has at least one. Lower it, or train for more steps."
            )

    def on_step_end(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # type: ignore[override]
        """Before a checkpoint of this step is written, which therefore holds the new reference."""
        last = last_sync(args, state.max_steps, state.global_step)
        if last == state.global_step:
            self._reference.sync(args.ref_model_mixup_alpha if args.sync_ref_model else 1.0)
        self._metrics.latest("reference/age", state.global_step - last)
