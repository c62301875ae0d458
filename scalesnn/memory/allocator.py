"""The memory of CPU tensors: freed blocks are kept for the next step."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

__all__ = ["keep_freed_blocks"]

SWITCH = "MALLOC_MMAP_THRESHOLD_"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**23  # bytes; larger blocks, few, are mapped and given back: the heap would split


@cache
def keep_freed_blocks() -> bool:
    """Have the C library keep freed blocks of up to 8 MiB, instead of having the system clear and map
    every page of them anew at the next training step.

    GPU memory, pinned and shared memory are not touched. A second call changes nothing.

    Returns:
        whether it does. Nothing has changed where ``MALLOC_MMAP_THRESHOLD_`` is set in the environment, or
        where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if SWITCH in os.environ or mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
