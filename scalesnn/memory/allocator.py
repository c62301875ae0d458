"""The memory of CPU tensors: which freed blocks are kept for the next step."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_blocks"]

SWITCH = "MALLOC_MMAP_THRESHOLD_"
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it when it makes the first tensor
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST, LARGEST_FRUGAL = 2**23, 2**19  # bytes; larger blocks are mapped and given back


def keep_freed_blocks(frugal: bool = False) -> bool:
    """Have the C library keep freed blocks of up to 8 MiB, instead of having the system clear and map
    every page of them anew at the next training step. Larger ones are mapped in huge pages, if the system
    lets programs ask for these.

    GPU memory, pinned and shared memory are not touched.

    Args:
        frugal: keep blocks of up to 512 KiB only. The process then holds little more than what is alive, and
            its steps take longer.

    Returns:
        whether it does. Nothing has changed where ``MALLOC_MMAP_THRESHOLD_`` is set in the environment, or
        where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if SWITCH in os.environ or mallopt is None:
        return False
    os.environ.setdefault(HUGE_PAGES, "1")
    largest = LARGEST_FRUGAL if frugal else LARGEST
    return bool(mallopt(M_MMAP_THRESHOLD, largest) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
