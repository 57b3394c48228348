"""Long work in pieces, on disk as they are done: what was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LOOKED_AT = 64  # numbers of each weight: training changes all of them


class PartialFile:
    """Pieces of work that are done: a line for what the work is, then a line of JSON per piece.

    Args:
        file: The file; it is there if the work was interrupted.
        what: All that the pieces depend on, as JSON holds it.
        kind: What the work is called in errors.

    Attributes:
        done: The pieces, in the order in which they were added.

    Raises:
        ValueError: if the file is of other work, cannot be read, or is a folder.
    """

    def __init__(self, file: Path, what: dict[str, Any], kind: str) -> None:
        self.file = file
        self.done: list[Any] = []
        what = json.loads(json.dumps(what))
        if file.is_dir():
            raise ValueError(f"{str(file)!r} is a folder, and what is done is kept in a file: give another path")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(what, sort_keys=True) + "\n", encoding="utf-8")
            return
        # What follows the last line break is a line that was being written when the work was stopped
        head, *lines = file.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        remedy = f"Set the options of then, or remove {str(file)!r} to start over"
        try:
            then = dict(json.loads(head))
            self.done = [json.loads(line) for line in lines]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(file)!r} is not of {kind} ({error}). {remedy}.") from error
        changed = sorted(name for name in {*then, *what} if then.get(name) != what.get(name))
        if changed:
            told = ", ".join(f"{name}={then.get(name)!r} (now {what.get(name)!r})" for name in changed)
            raise ValueError(f"{str(file)!r} is of {kind} with {told}. {remedy}.")
        self.file.write_text("".join(line + "\n" for line in (head, *lines)), encoding="utf-8")

    def add(self, pieces: Iterable[Any]) -> None:
        """Keep these, on disk at once."""
        pieces = list(pieces)
        with self.file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(piece, ensure_ascii=False) + "\n" for piece in pieces)
        self.done += pieces


def weights_hash(model: nn.Module) -> str:
    """Tells a model from the same one trained further: of the first numbers of every weight, its name and shape."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().reshape(-1)[:_LOOKED_AT].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def rows_hash(rows: Iterable[Any], prompts: Iterable[Any]) -> str:
    """Of the prompts as the model reads them (`ids`), and of all that rewards can see, in their order."""
    digest = hashlib.sha256()
    for prompt, row in zip(prompts, rows, strict=True):
        digest.update(json.dumps([prompt.ids, row], default=str, sort_keys=True).encode())
    return digest.hexdigest()[:16]
