"""What a checkpoint holds besides transformers' own files, so that a run can go on inside a generation."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from .config import GRPOConfig
from .curriculum import CurriculumRows
from .data import GenerationFeed
from .experience import Experience
from .policy import AdapterOff, LivingReference, Snapshot

logger = get_logger(__name__)

Reference = AdapterOff | Snapshot | LivingReference | None

# Together they say which completions a micro-step trains on, so inside a generation none of them may change
_LAYOUT = (
    "world_size",
    "steps_per_generation",
    "num_iterations",
    "per_device_train_batch_size",
    "num_generations",
    "gradient_accumulation_steps",
)
_REFERENCES = {
    "AdapterOff": "the base model without its adapter",
    "Snapshot": "a snapshot of the trainable parameters",
}


def save_state(
    folder: Path,
    args: GRPOConfig,
    feed: GenerationFeed,
    experience: Experience | None,
    reference: Reference,
    curriculum: CurriculumRows | None,
) -> None:
    """Write this process's file: the place in the generation, what of it is still to be trained on, the reference, and
    what the curriculum knows.

    Makes the folder: this comes before transformers' own files, of which some processes write none.
    """
    unfinished = experience if feed.position > 0 else None  # at 0 the next step makes a new generation
    present = _present(reference)
    state = {
        "layout": _layout(args),
        "position": feed.position,
        "experience": None if unfinished is None else unfinished.state_dict(),
        "reference_kind": type(present).__name__,
        "reference_is_living": isinstance(reference, LivingReference),
        "reference": present.values if isinstance(present, Snapshot) else None,
        "curriculum": None if curriculum is None else curriculum.state_dict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, _state_file(folder, args.process_index))


def place_in_cycle(args: GRPOConfig, global_step: int, order: Sized | None) -> int:
    """Micro-steps of a generation that lie behind the dataloader when training goes on at `global_step`.

    0 is the start of a generation. transformers skips the optimizer steps of the epoch so far, all of them of
    `gradient_accumulation_steps` micro-batches; a stream (`order=None`) is one epoch to it.
    """
    if args.ignore_data_skip:
        return 0
    if order is not None:
        micro_batches = len(order) // (args.per_device_train_batch_size * args.world_size)
        global_step %= max(1, -(-micro_batches // args.gradient_accumulation_steps))
    return global_step * args.gradient_accumulation_steps % _cycle(args)


def load_state(
    folder: Path,
    args: GRPOConfig,
    feed: GenerationFeed,
    reference: Reference,
    curriculum: CurriculumRows | None,
    place: int,
) -> Experience | None:
    """Restore reference, curriculum, and the generation that was being trained on, if there is one, which is returned.

    Args:
        place: `place_in_cycle` of this run.

    Raises:
        ValueError: on all processes, if on any of them the reference is another one, the curriculum is of other data,
            or the data go on inside a generation that cannot be restored.
    """
    own = _state_file(folder, args.process_index)
    # Every process has the same reference: one that there was not then finds it in the first one's file
    path = own if own.exists() else _state_file(folder, 0)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    anywhere = any(gather_object([state is not None]))
    problem = (
        _generation_problem(state, own, args, place)
        or _reference_problem(state, own, reference, anywhere)
        or _curriculum_problem(state, own, curriculum, anywhere)
    )
    # Of all processes: one that stopped alone would leave the others waiting for it
    problems = [found for found in gather_object([problem]) if found]
    if problems:
        raise ValueError(problems[0])
    if curriculum is not None:
        known = (state or {}).get("curriculum")
        if known is None:
            logger.warning(f"{own} has no curriculum: what was seen of pass rates before is not known here.")
        else:
            curriculum.load_state_dict(known)
    if state is None:
        if isinstance(_present(reference), Snapshot):
            logger.warning(f"{own} is missing: the KL reference is the policy that the trainer was built with.")
        return None
    if isinstance(reference, Snapshot | LivingReference) and state["reference"] is not None:
        reference.restore(state["reference"])
    if place == 0:
        return None
    feed.resume(place)
    return Experience(**state["experience"])


def _generation_problem(state: dict[str, Any] | None, own: Path, args: GRPOConfig, place: int) -> str | None:
    """Why the run cannot go on with the generation it was in, if it was in one."""
    position = place if state is None else state["position"]
    if args.ignore_data_skip or position == place == 0:
        return None
    remedy = (
        "resume from a checkpoint between two generations, or set ignore_data_skip=True: the epoch's data then start "
        "over, with a new generation."
    )
    now, then = _layout(args), {} if state is None else state["layout"]
    changed = [f"{name}={then[name]} (now {now[name]})" for name in then if then[name] != now[name]]
    if changed:
        return (
            f"{own.parent} was saved with {', '.join(changed)}, and a generation must be trained on as it was drawn. "
            f"Set the values of then, {remedy}"
        )
    if not own.exists():
        return (
            f"{own} is missing, with the completions that were being trained on: training goes on at micro-step "
            f"{place} of the {_cycle(args)} that one generation serves. Restore the file, {remedy}"
        )
    if position != place:
        return (
            f"{own} was saved at micro-step {position} of a generation, but the data go on at {place}: trainer_state"
            f".json is of another step, or train_dataset of another length. Restore them, {remedy}"
        )
    return None


def _reference_problem(state: dict[str, Any] | None, own: Path, reference: Reference, anywhere: bool) -> str | None:
    """Why the KL would be taken to another reference than before; starting or ceasing to have one is no problem."""
    if state is None:
        if isinstance(reference, Snapshot | LivingReference) and anywhere:
            return (
                f"{own} is missing, while other processes found the checkpoint's KL reference in theirs. Copy their "
                "grpo_state_*.pt to every machine."
            )
        return None
    then, now = state["reference_kind"], type(_present(reference)).__name__
    if then == now or reference is None or then == type(None).__name__:
        return None
    if isinstance(reference, LivingReference) and then == Snapshot.__name__:
        return None  # of a fresh adapter, that has been synced since
    if then == Snapshot.__name__ and state["reference_is_living"]:
        return (
            f"the KL reference of {own.parent} had followed the policy (sync_ref_model or reference_rounds), and this "
            "trainer's does not. Set the field as it was, or start a new run, without resume_from_checkpoint."
        )
    return (
        f"the KL reference of {own.parent} is {_REFERENCES[then]} ({then}), that of this trainer is {_REFERENCES[now]} "
        f"({now}). Build the trainer from the model and peft_config that the first run was built from: train() itself "
        "loads the checkpoint's weights. Or start a new run, without resume_from_checkpoint."
    )


def _curriculum_problem(
    state: dict[str, Any] | None, own: Path, curriculum: CurriculumRows | None, anywhere: bool
) -> str | None:
    """Why what was known of pass rates does not fit; starting or ceasing to have a curriculum is no problem."""
    if curriculum is None:
        return None
    if state is None:
        return (
            f"{own} is missing, while other processes found the curriculum's state in theirs, and would choose other "
            "prompts. Copy their grpo_state_*.pt to every machine."
            if anywhere
            else None
        )
    known = state.get("curriculum")
    if known is not None and len(known["passes"]) != len(curriculum.posteriors):
        return (
            f"{own} has the pass rates of {len(known['passes'])} prompts, and train_dataset has "
            f"{len(curriculum.posteriors)} rows. Resume with the dataset of then, or start a new run, without "
            "resume_from_checkpoint."
        )
    return None


def _present(reference: Reference) -> AdapterOff | Snapshot | None:
    return reference.current if isinstance(reference, LivingReference) else reference


def _layout(args: GRPOConfig) -> dict[str, int]:
    return {name: getattr(args, name) for name in _LAYOUT}


def _cycle(args: GRPOConfig) -> int:
    return cast(int, args.steps_per_generation) * args.num_iterations


def _state_file(folder: Path, rank: int) -> Path:
    return folder / f"grpo_state_{rank}.pt"
