"""How the trainer's config orders the rows of the training data."""

from __future__ import annotations

from typing import Any, cast

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers.trainer_pt_utils import AcceleratorConfig

from .config import GRPOConfig
from .data import repeat_stream

logger = get_logger(__name__)


def group_order(args: GRPOConfig) -> dict[str, Any]:
    """Arguments that `GroupOrder` and `repeat_stream` share."""
    return {
        "num_generations": args.num_generations,
        "batch_size": args.per_device_train_batch_size,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": args.num_iterations,
        "world_size": args.world_size,
        "shuffle": args.shuffle_dataset,
        "seed": args.seed,
    }


def grouped_stream(data: Dataset | IterableDataset, args: GRPOConfig) -> Dataset | IterableDataset:
    """A stream in the order of `GroupOrder`, every process reading its own (rows are not tensors); or the dataset."""
    if not isinstance(data, IterableDataset):
        return data
    cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
    if args.dataloader_num_workers:
        logger.warning(
            f"dataloader_num_workers={args.dataloader_num_workers} is set to 0: several workers would take turns "
            "within a stream's groups and mix them up."
        )
        args.dataloader_num_workers = 0
    return repeat_stream(data, **group_order(args))
