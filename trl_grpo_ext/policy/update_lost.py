"""Which share of an optimizer step's updates is lost to rounding.

A weight `w` in bfloat16 has 8 significant bits, so an update below `|w| / 512` is rounded away: at a learning rate of
1e-6 that is nearly every entry of a fresh LoRA-A, and training stalls without a sign. In float32 the same happens below
`|w| / 2^25`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# Entries of each parameter that are watched. An optimizer step costs three small operations per parameter for it: on a
# GPU some milliseconds for the 400 matrices of a 28-layer adapter. A copy of the adapter would cost its memory as well.
_ENTRIES = 4096


class UpdateWatch:
    """Counts, around an optimizer step, the entries that it left bit-identical.

    Of every parameter up to 4,096 entries are watched, evenly spread; smaller ones whole. Counted are entries whose
    gradient is not zero, because the others have nothing to lose: LoRA-A at the first step (B is 0), and an embedding's
    rows of tokens that did not occur.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (entries now, their copy, counted)

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the entries; gradients are those that the optimizer will use."""
        self._before = []
        for parameter in self._parameters:
            if parameter.grad is not None:
                entries = _spread(parameter.detach())
                self._before.append((entries, entries.clone(), _spread(parameter.grad) != 0))

    @torch.no_grad()
    def after_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of entries that are as before, and that were counted; on the parameters' device."""
        lost = [((entries == old) & counted).sum() for entries, old, counted in self._before]
        total = [counted.sum() for _, _, counted in self._before]
        self._before = []
        if not lost:
            return torch.zeros(()), torch.zeros(())
        return torch.stack(lost).sum(), torch.stack(total).sum()


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """A view of up to `_ENTRIES` entries. The step between them is odd, so that it does not stay in one column."""
    flat = tensor.reshape(-1)
    return flat[:: -(-flat.numel() // _ENTRIES) | 1]
