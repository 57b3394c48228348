"""What would stop a run of `trl-grpo train` later on, and can be seen before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .model_options import check_writable

if TYPE_CHECKING:
    from ..config import GRPOConfig


def check_run(args: GRPOConfig, streaming: bool, has_evaluation: bool) -> None:
    """Refuse a run that would not come to its end.

    Args:
        args: Of the run; its `output_dir` is known.
        streaming: The training prompts are read as they are needed, and nobody knows how many there are.
        has_evaluation: There are held-out prompts.

    Raises:
        ValueError: for a folder that cannot be written, a checkpoint that is not there, evaluations without prompts
            and epochs without an end.
    """
    check_writable("output_dir", str(args.output_dir), folder=True)
    _check_resume(args)
    if streaming and args.max_steps <= 0:
        raise ValueError(
            f"dataset_streaming is set, and max_steps={args.max_steps}: nobody knows how many rows an epoch has. Set "
            "max_steps, or leave dataset_streaming out"
        )
    if has_evaluation:
        return
    for option, asked in (
        (
            f"eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r}",
            args.eval_strategy != "no",
        ),
        ("eval_on_start=True", args.eval_on_start),
    ):
        if asked:
            raise ValueError(f"{option} asks for evaluations, and there are no prompts for them: set eval_dataset")


def _check_resume(args: GRPOConfig) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    given = args.resume_from_checkpoint
    if not given or str(given).lower() == "false":
        return
    if str(given).lower() == "true":
        folder = str(args.output_dir)
        if not Path(folder).is_dir() or get_last_checkpoint(folder) is None:
            raise ValueError(
                f"resume_from_checkpoint is true, and output_dir={folder!r} has no checkpoint: leave it out to begin "
                "a run there, or give another output_dir"
            )
    elif not Path(given).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={given!r} is no folder: give a checkpoint, or true for the last one in output_dir"
        )
