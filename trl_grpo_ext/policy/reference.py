"""The reference policy, without a second copy of the base.

- A fresh adapter starts at zero, so the reference is the base with the adapter switched off: free.
- An adapter that was already trained (or that starts away from zero, as PiSSA does) is its own reference: a frozen
  snapshot of the trainable parameters, one adapter in size, put in their place while the reference runs.
- Full fine-tuning snapshots every parameter, which is what a second model would cost.
- A living reference follows the policy while it is trained: it becomes a snapshot when it first does.

A snapshot is never part of the model, so it is in no export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from torch import nn


class AdapterOff:
    """The base without its adapter."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    @contextmanager
    def active(self) -> Iterator[None]:
        """Adapter off inside, on again after."""
        with self._model.disable_adapter():
            yield


class Snapshot:
    """The trainable parameters as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self._parameters]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Snapshot inside, the current values again after. The parameters' storage is exchanged, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        """Set every value `r` to `(1 - alpha) r + alpha p` with the policy's present `p`, in place.

        The average is one of parameters, as TRL's is. The product of two averaged LoRA matrices is not the average of
        the products, unless `alpha` is 0 or 1.
        """
        for value, parameter in zip(self.values, self._parameters, strict=True):
            if alpha == 1:
                value.copy_(parameter)
            else:
                value.mul_(1 - alpha).add_(parameter.detach(), alpha=alpha)

    def restore(self, values: list[torch.Tensor]) -> None:
        """Take the snapshot of an earlier run (from a checkpoint).

        Raises:
            ValueError: if it is not of this policy.
        """
        if [v.shape for v in values] != [v.shape for v in self.values]:
            raise ValueError("the checkpoint's reference does not fit the policy: another adapter was trained then")
        for mine, theirs in zip(self.values, values, strict=True):
            mine.copy_(theirs)

    def _exchange(self) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.data, self.values[i] = self.values[i], parameter.data
        # Autocast keeps half-precision copies by parameter, not by what is in it: they would be the other one's
        torch.clear_autocast_cache()


def make_reference(model: nn.Module) -> AdapterOff | Snapshot:
    """The cheapest exact reference of a policy that has not been trained yet in this run."""
    if isinstance(model, PeftModel) and _adapter_is_zero(model):
        return AdapterOff(model)
    return Snapshot(model)


class LivingReference:
    """A reference that is set to the policy from time to time, or taken part of the way towards it.

    Beyond what `make_reference` takes it costs one snapshot of what trains, at most: a fresh adapter's from the first
    sync on, or from the start if `mixes`.

    Args:
        model: The policy before training.
        mixes: Whether `sync` will be called with an `alpha` below 1. An average needs the adapter's first values, which
            the base alone does not have.
    """

    def __init__(self, model: nn.Module, *, mixes: bool) -> None:
        self._model = model
        first = make_reference(model)
        self.current: AdapterOff | Snapshot = Snapshot(model) if mixes and isinstance(first, AdapterOff) else first

    def active(self) -> AbstractContextManager[None]:
        """The reference inside, the policy again after."""
        return self.current.active()

    def sync(self, alpha: float) -> None:
        """Reference = `(1 - alpha)` reference + `alpha` policy, parameter by parameter; with 1 it is the policy.

        Raises:
            ValueError: for an `alpha` below 1 where `mixes` was not said.
        """
        if isinstance(self.current, Snapshot):
            self.current.mix(alpha)
        elif alpha == 1:
            self.current = Snapshot(self._model)
        else:
            raise ValueError(f"alpha={alpha} needs a reference made with mixes=True: the adapter's start is not known.")

    def restore(self, values: list[torch.Tensor]) -> None:
        """As `Snapshot.restore`, also where there had been no sync yet in this run."""
        if not isinstance(self.current, Snapshot):
            self.current = Snapshot(self._model)
        self.current.restore(values)


@torch.no_grad()
def _adapter_is_zero(model: PeftModel) -> bool:
    """Whether the adapter does nothing yet: every LoRA B is 0, and nothing else is to train but what LoRA adds.

    Of an embedding's pair, PEFT starts A at 0 and draws B.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_B" in name or "lora_embedding_A" in name:
            if bool(parameter.any()):
                return False
        elif "lora_A" not in name and "lora_embedding_B" not in name:
            return False
    return True
