"""Evaluation mode for a while: what sampling, the reference and start-up measurements run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bitsandbytes.nn.modules import Linear4bit
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off (both follow `training`), and back on as they were, module by module.

    No random number is drawn inside, so a run that is resumed draws the same ones as a run that went straight on.
    """
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        # A 4-bit layer has nothing to switch off, and a single pass in evaluation mode repacks its weights on CPUs with
        # AVX512-BF16, after which bitsandbytes has no gradient for it
        module.training = isinstance(module, Linear4bit)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
