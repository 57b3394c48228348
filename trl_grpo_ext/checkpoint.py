"""What a checkpoint holds besides transformers' own files, so that a run can go on inside a generation."""

from __future__ import annotations

from pathlib import Path

import torch

from .data import GenerationFeed
from .experience import Experience
from .policy import AdapterOff, Snapshot

Reference = AdapterOff | Snapshot | None


def save_state(
    folder: Path, rank: int, feed: GenerationFeed, experience: Experience | None, reference: Reference
) -> None:
    """Write this process's file: the place in the generation, what of it is still to be trained on, the reference."""
    unfinished = experience if feed.position > 0 else None  # at 0 the next step makes a new generation
    state = {
        "position": feed.position,
        "experience": None if unfinished is None else unfinished.state_dict(),
        "reference": reference.values if isinstance(reference, Snapshot) else None,
    }
    torch.save(state, _state_file(folder, rank))


def load_state(
    folder: Path, rank: int, feed: GenerationFeed, reference: Reference, *, skip_experience: bool
) -> Experience | None:
    """Restore the reference, and the generation that was being trained on, if there is one; that is returned.

    Raises:
        ValueError: if the reference is not of this policy.
    """
    path = _state_file(folder, rank)
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(reference, Snapshot) and state["reference"] is not None:
        reference.restore(state["reference"])
    if state["experience"] is None or skip_experience:
        return None
    feed.resume(state["position"])
    return Experience(**state["experience"])


def _state_file(folder: Path, rank: int) -> Path:
    return folder / f"grpo_state_{rank}.pt"
