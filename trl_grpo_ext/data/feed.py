"""From the dataloader's micro-batches to generation batches and back.

The dataloader hands out one micro-batch of rows per micro-step. A generation serves
`steps_per_generation * num_iterations` micro-steps (a *cycle*): its prompts are those of the cycle's first
`steps_per_generation` micro-batches, read ahead if the optimizer step is shorter; the rows of later iterations repeat
them and are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Take:
    """Consecutive micro-steps that use one generation."""

    new_rows: list[Row] | None  # rows to generate for first, or None: go on with the latest generation
    slices: range  # which `steps_per_generation`-ths of the generation are used, one per micro-step


class GenerationFeed:
    """Says, optimizer step by optimizer step, what to generate and which part of which generation to train on."""

    def __init__(self, steps_per_generation: int, num_iterations: int) -> None:
        self._steps = steps_per_generation
        self._cycle = steps_per_generation * num_iterations
        self.position = 0  # micro-steps taken in the current cycle
        self._iterator: Iterator[list[Row]] | None = None
        self._resumed = False

    def resume(self, position: int) -> None:
        """Continue inside a cycle whose generation was restored; the next iterator stands at that micro-step."""
        self.position = position
        self._resumed = True

    def take(self, iterator: Iterator[list[Row]], num_micro_steps: int) -> list[Take]:
        """What the next `num_micro_steps` micro-steps use; fewer where the iterator ends."""
        if iterator is not self._iterator:
            if self._resumed:
                # The rows read ahead before the checkpoint are part of the restored generation
                for _ in range(max(0, self._steps - self.position) if self.position else 0):
                    next(iterator, None)
            else:
                self.position = 0
            self._iterator, self._resumed = iterator, False
        takes = []
        while num_micro_steps > 0:
            rows: list[Row] | None = None
            if self.position == 0:
                batches = _up_to(iterator, self._steps)
                if len(batches) < self._steps:
                    break
                rows = [row for batch in batches for row in batch]
            offset = self.position % self._steps
            count = min(num_micro_steps, self._steps - offset)
            if self.position >= self._steps:
                _up_to(iterator, count)
            takes.append(Take(rows, range(offset, offset + count)))
            self.position = (self.position + count) % self._cycle
            num_micro_steps -= count
        return takes


def _up_to(iterator: Iterator[list[Row]], count: int) -> list[list[Row]]:
    batches = []
    for _ in range(count):
        batch = next(iterator, None)
        if batch is None:
            break
        batches.append(batch)
    return batches
