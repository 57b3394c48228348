"""Growth of peak memory over a block of code: what running it needs beyond what was there before."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

SAMPLING_SECONDS = 0.005


class MemoryGrowth:
    """`with MemoryGrowth(device) as memory: ...`, then `memory.bytes`, measured as `memory.method` says.

    On CUDA it is PyTorch's count of allocated bytes. On a CPU it is the resident set: the kernel's own high-water mark
    where it can be reset (Linux), else the largest of samples taken every 5 ms.
    """

    def __init__(self, device: str) -> None:
        self.method = device if device == "cuda" else "VmHWM" if _reset_high_water_mark() else "sampled RSS"
        self.bytes = 0
        self._stop = threading.Event()
        self._sampled_peak = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryGrowth:
        gc.collect()
        if self.method == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        _return_free_heap()  # else the block could reuse, unseen, what setting it up has left behind
        self._before = psutil.Process().memory_info().rss
        if self.method == "VmHWM":
            _reset_high_water_mark()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.method == "sampled RSS":
            self._stop.set()
            self._thread.join()
        peaks = {
            "cuda": torch.cuda.max_memory_allocated,
            "VmHWM": _high_water_mark,
            "sampled RSS": lambda: self._sampled_peak,
        }
        self.bytes = peaks[self.method]() - self._before

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(SAMPLING_SECONDS):
            self._sampled_peak = max(self._sampled_peak, process.memory_info().rss)


def _reset_high_water_mark() -> bool:
    """Whether the kernel let us: writing 5 to `clear_refs` sets VmHWM to the current resident set (man 5 proc)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024  # in kB


def _return_free_heap() -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc; musl has none
        libc.malloc_trim(0)
