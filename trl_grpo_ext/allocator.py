"""Freed activations stay with the process, on a CPU with glibc.

glibc hands large blocks back to the kernel as soon as they are freed. The next activation of the same size then gets
them back page by page, each a fault and 4 KB of zeros: about a tenth of an update's time. PyTorch's tuning guide
recommends another allocator for that reason; this asks glibc for the same behaviour, within limits.

Quantized layers are dequantized into large blocks, which come and go, and which glibc, keeping them, fails to fit into
one another: an NF4 model of four layers then held 1.8 GB more than it needed. So where there are such layers, blocks of
their size are handed back.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), and their values here
_M_TRIM_THRESHOLD, _KEPT_BYTES = -1, 64 * 2**20  # free memory at the heap's end beyond this is given back
_M_MMAP_THRESHOLD = -3  # larger blocks are mapped by themselves, and given back
_OWN_MAPPING_BYTES, _OWN_MAPPING_BYTES_QUANTIZED = 32 * 2**20, 16 * 2**20

_asked: int | None = None  # for which threshold


def keep_freed_memory(quantized: bool = False) -> bool:
    """Ask glibc to keep up to 64 MB of freed memory, only in smaller blocks for `quantized` layers; whether it does.

    It is left alone where somebody else decides: another C library or allocator, or `MALLOC_*` in the environment.
    The setting is the process's and stays, once it is that of quantized layers for good.
    """
    global _asked
    threshold = _OWN_MAPPING_BYTES_QUANTIZED if quantized else _OWN_MAPPING_BYTES
    if _asked is not None and _asked <= threshold:
        return True
    decided = any(name.startswith("MALLOC_") for name in os.environ) or "alloc" in os.environ.get("LD_PRELOAD", "")
    if decided or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    if not (libc.mallopt(_M_MMAP_THRESHOLD, threshold) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)):
        return False
    _asked = threshold
    return True
