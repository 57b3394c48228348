"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, to write into: it gets that name if all goes well, and is removed otherwise.

    `target` must not exist, or be an empty folder.
    """
    target = target.absolute()
    created = [parent for parent in target.parents if not parent.exists()]  # the innermost first
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.incomplete")
    folder.mkdir()
    try:
        yield folder
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            if not any(parent.iterdir()):
                parent.rmdir()
        raise
