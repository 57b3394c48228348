"""Options that commands share: the model, and the file or folder that results go to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from ..side_by_side import LoadedPolicy, Which


@dataclass
class ModelOptions:
    """Who generates."""

    _argument_group_name: ClassVar[str] = "model"

    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of the base; by default the one adapter_config.json names"}
    )
    revision: str | None = field(default=None, metadata={"help": "revision of the base on the Hub"})
    adapter: str | None = field(default=None, metadata={"help": "folder or Hub id of an adapter", "metavar": "DIR"})
    which: Literal["base", "adapter", "both"] | None = field(
        default=None, metadata={"help": "who generates; by default both where there is an adapter"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "of the weights; auto: as they are stored"}
    )
    quantize: Literal["nf4", "fp4", "int8"] | None = field(
        default=None, metadata={"help": "quantize the base while loading it, by bitsandbytes"}
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, ...; by default the GPU if there is one"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run modelling code that comes with the base"})

    def speakers(self) -> Which:
        """Who generates: as asked for, or both where there is an adapter.

        Raises:
            ValueError: an adapter is asked for, and there is none.
        """
        which = self.which or ("base" if self.adapter is None else "both")
        if which != "base" and self.adapter is None:
            raise ValueError(f"--which {which} needs --adapter")
        return which

    def load(self) -> LoadedPolicy:
        """The model, its adapter and its tokenizer.

        Raises:
            ValueError: as in `load_policy`.
        """
        from ..side_by_side import load_policy

        return load_policy(
            self.model,
            self.adapter,
            revision=self.revision,
            dtype=self.dtype,
            quantize=self.quantize,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


def check_writable(option: str, path: str | Path, *, folder: bool = False) -> None:
    """Refuse a file (or a folder) that could not be written, before hours of work end in it.

    Raises:
        ValueError: names the option, the path and what is in the way.
    """
    target = Path(path)
    kind = "folder" if folder else "file"
    if target.exists() and target.is_dir() != folder:
        other = "file" if folder else "folder"
        raise ValueError(f"{option}={str(path)!r} is a {other}, and a {kind} is to be written: give another path")
    place = target if target.exists() else target.parent
    while not place.exists():
        place = place.parent
    if place != target and not place.is_dir():
        raise ValueError(f"{option}={str(path)!r} cannot be written: {place} is not a folder. Give another path")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{option}={str(path)!r} cannot be written: {place} may not be written to. Give another path")
