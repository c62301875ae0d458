"""The C library's allocator, told what a training loop does: the same blocks, taken and freed every step."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_blocks"]

SWITCH = "MALLOC_MMAP_THRESHOLD_"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**30  # bytes; a block above it is still mapped by itself and given back


def keep_freed_blocks() -> bool:
    """From here on this process keeps the memory that CPU tensors free, for the next ones.

    By default glibc hands large blocks back to the system at once, which clears and maps every page of
    them anew at the next step: about a tenth of a step of a spiking ResNet on the CPU. GPU memory is not
    touched.

    Returns:
        False where the C library has no such switch (it is not glibc), or where the environment has set its
        own (``MALLOC_MMAP_THRESHOLD_``, see docs/memory.md); nothing has changed then.
    """
    if SWITCH in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
