"""Freed activations stay with the process, on a CPU with glibc.

glibc hands large blocks back to the kernel as soon as they are freed. The next activation of the same size then gets
them back page by page, each a fault and 4 KB of zeros: about a tenth of an update's time. PyTorch's tuning guide
recommends another allocator for that reason; this asks glibc for the same behaviour, within limits.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), and their values here
_M_TRIM_THRESHOLD, _KEPT_BYTES = -1, 64 * 2**20  # free memory at the heap's end beyond this is given back
_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES = -3, 32 * 2**20  # larger blocks are mapped by themselves, and given back

_asked = False


def keep_freed_memory() -> bool:
    """Ask glibc to keep up to 64 MB of freed memory, once; whether it does.

    It is left alone where somebody else decides: another C library or allocator, or `MALLOC_*` in the environment.
    The setting is the process's and stays.
    """
    global _asked
    if _asked:
        return True
    decided = any(name.startswith("MALLOC_") for name in os.environ) or "alloc" in os.environ.get("LD_PRELOAD", "")
    if decided or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    _asked = bool(libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)) and bool(
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    )
    return _asked
