"""Callbacks that watch what training does to the weights: the base stays, the adapter moves."""

from __future__ import annotations

import time
from typing import Any, cast

from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .metrics import MetricLog
from .policy import UpdateWatch, base_fingerprint, trains_base

logger = get_logger(__name__)


class BaseFingerprint(TrainerCallback, ExportableState):
    """Logs `base_fingerprint` when training starts and ends, and says so where it is not what it was.

    Kept in checkpoints (`stateful_callbacks` of `trainer_state.json`), so a run that is resumed on another base is
    told of it. Does nothing in full fine-tuning, nor where biases of the base train.
    """

    def __init__(self) -> None:
        self.at_start: str | None = None
        self.at_end: str | None = None

    def state(self) -> dict[str, Any]:
        """What checkpoints hold."""
        return {"args": {}, "attributes": {"at_start": self.at_start, "at_end": self.at_end}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """The base as it is, compared with that of the checkpoint."""
        if not _has_frozen_base(model):
            return
        callbacks: Any = state.stateful_callbacks  # a dict by name, once training has begun
        saved = callbacks.get(type(self).__name__, {})
        before = saved.get("attributes", {}).get("at_start") if isinstance(saved, dict) else None
        self.at_start, self.at_end = self._take(model, "start"), None
        if before not in (None, self.at_start):
            logger.warning(
                f"The base's fingerprint is {self.at_start}, that of the checkpoint's run was {before}: its adapter "
                "was trained on another base (other weights, dtype or quantization)."
            )
        callbacks[type(self).__name__] = self.state()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """The base as it is, compared with the start's."""
        if self.at_start is None:
            return
        self.at_end = self._take(model, "end")
        callbacks: Any = state.stateful_callbacks
        callbacks[type(self).__name__] = self.state()
        if self.at_end != self.at_start:
            logger.warning(
                f"The base's fingerprint was {self.at_start} when training started and is {self.at_end} now: something "
                "changed the frozen weights. The adapter belongs to neither; load the base again."
            )

    @staticmethod
    def _take(model: Any, when: str) -> str:
        started = time.perf_counter()
        fingerprint = base_fingerprint(model)
        seconds = time.perf_counter() - started
        logger.info(f"Fingerprint of the base at the {when} of training: {fingerprint} ({seconds:.1f} s)")
        return fingerprint


class UpdateLost(TrainerCallback):
    """Logs `adapter/update_lost`: the share of the adapter's entries that an optimizer step left bit-identical.

    Steps at a learning rate of 0, as warm-up begins with, are left out: there is nothing to lose.
    """

    def __init__(self, metrics: MetricLog) -> None:
        self._metrics = metrics
        self._watch: UpdateWatch | None = None
        self._counting = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Only adapters are watched."""
        self._watch = UpdateWatch(model.parameters()) if isinstance(model, PeftModel) else None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Gradients are what the optimizer will use."""
        self._counting = any(group["lr"] != 0 for group in optimizer.param_groups)
        if self._watch is not None and self._counting:
            self._watch.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer has moved."""
        if self._watch is not None and self._counting:
            self._metrics.accumulate("adapter/update_lost", *self._watch.after_step())


def fingerprint_at_start(state: TrainerState) -> str | None:
    """What `BaseFingerprint` noted when training began; None if it has not, or had nothing to watch."""
    callbacks: Any = state.stateful_callbacks  # a dict by name, once training has begun
    saved = callbacks.get(BaseFingerprint.__name__) if isinstance(callbacks, dict) else None
    return cast("str | None", saved["attributes"]["at_start"]) if isinstance(saved, dict) else None


def _has_frozen_base(model: nn.Module | None) -> bool:
    return isinstance(model, PeftModel) and not trains_base(model)
