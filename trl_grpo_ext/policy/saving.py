"""What is saved of a policy: the adapter that is trained, and no other that the model may hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from peft import PeftModel
from torch import nn


@contextmanager
def active_adapter_only(model: nn.Module) -> Iterator[None]:
    """Inside, `model.save_pretrained` writes the active adapter alone.

    PEFT saves every adapter, each but `default` in a subfolder, and a model from TRL may hold its reference, `ref`.
    """
    if not isinstance(model, PeftModel) or len(model.peft_config) == 1:
        yield
        return
    saving = partial(model.save_pretrained, selected_adapters=list(model.active_adapters))
    model.save_pretrained = saving  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.save_pretrained  # the method of the class again
