"""The order of the training data: every prompt `num_generations` times, groups whole."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GroupOrder(Sampler[int]):
    """Row indices: every process reads whole groups, and the same ones in every iteration over a generation batch.

    A generation batch is `world_size * steps_per_generation` micro-batches of `batch_size` rows; `num_iterations`
    passes over it follow each other, as in TRL's `RepeatSampler`. accelerate deals micro-batches out round-robin, so
    the rows of process r are written to every `world_size`-th micro-batch from the r-th. A last generation batch that
    is not full is dropped. The order depends on `(seed, epoch)`, so resuming in a later epoch goes on in that epoch's
    order.
    """

    def __init__(
        self,
        data: Sized,
        *,
        num_generations: int,
        batch_size: int,
        steps_per_generation: int,
        num_iterations: int = 1,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self._size = len(data)
        self._num_generations = num_generations
        self._batch_size = batch_size
        self._steps = steps_per_generation
        self._num_iterations = num_iterations
        self._world_size = world_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._prompts = batch_size * steps_per_generation * world_size // num_generations

    def set_epoch(self, epoch: int) -> None:
        """Order of the next pass; the Trainer calls it at the start of every epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size // self._prompts * self._prompts * self._num_generations * self._num_iterations

    def __iter__(self) -> Iterator[int]:
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            order = torch.randperm(self._size, generator=generator).tolist()
        else:
            order = list(range(self._size))
        for start in range(0, self._size - self._prompts + 1, self._prompts):
            rows = [i for i in order[start : start + self._prompts] for _ in range(self._num_generations)]
            per_process = len(rows) // self._world_size
            for _ in range(self._num_iterations):
                for step in range(self._steps):
                    for rank in range(self._world_size):
                        first = rank * per_process + step * self._batch_size
                        yield from rows[first : first + self._batch_size]


class EpochOrder(TrainerCallback):
    """Tells `GroupOrder` the epoch, which does not reach it by itself on several processes that resume inside one.

    accelerate then wraps the sampler four times (data loader, skipped batches, a process's share, batches), and
    `DataLoaderShard.set_epoch` looks through fewer layers.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """`state.epoch` has a fraction where the run was stopped inside the epoch."""
        layer: Any = train_dataloader
        while getattr(layer, "batch_sampler", None) is not None:
            layer = layer.batch_sampler
        sampler = getattr(layer, "sampler", None)
        if isinstance(sampler, GroupOrder):
            sampler.set_epoch(int(state.epoch))


def repeat_stream(
    data: IterableDataset,
    *,
    num_generations: int,
    batch_size: int,
    steps_per_generation: int,
    num_iterations: int,
    world_size: int,
    shuffle: bool,
    seed: int,
) -> IterableDataset:
    """`GroupOrder` for a stream, which cannot be indexed: the same repeats, after `datasets`' buffered shuffle."""
    if shuffle:
        data = data.shuffle(seed=seed)
    prompts = batch_size * steps_per_generation * world_size // num_generations
    order = list(
        GroupOrder(
            range(prompts),
            num_generations=num_generations,
            batch_size=batch_size,
            steps_per_generation=steps_per_generation,
            num_iterations=num_iterations,
            world_size=world_size,
            shuffle=False,
        )
    )

    def repeat(batch: dict[str, list[object]]) -> dict[str, list[object]]:
        return {name: [values[i] for i in order] for name, values in batch.items()}

    return data.map(repeat, batched=True, batch_size=prompts, drop_last_batch=True)
