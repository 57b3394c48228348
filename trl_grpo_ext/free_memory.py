"""Where a model is to go, and how much memory is free there."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
# (limit, in use, statistics, name of the page cache that can be dropped) of control groups, version 2 and 1
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: the GPU if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device={str(device)!r} cannot be used here: {reason}") from error
    return place


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`; None where the system does not say (other than Linux and CUDA)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    free = _field(_MEMINFO.read_text(), "MemAvailable:") * 1024
    for limit, usage, statistics, cache in _CGROUPS:
        if Path(limit).is_file() and Path(usage).is_file():
            allowed = Path(limit).read_text().strip()
            if allowed.isdigit():  # "max" is no limit
                droppable = _field(Path(statistics).read_text(), cache) if Path(statistics).is_file() else 0
                free = min(free, int(allowed) - int(Path(usage).read_text()) + droppable)
    return max(free, 0)


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0


def gib(count: float) -> str:
    """Bytes as text: "1.50 GiB", small ones in MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
