"""The memory of CPU tensors: kept from step to step, without holding more than was ever alive at once."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path

from scalesnn.kernels.build import BUILD_ERRORS, reason, shared_library

__all__ = ["trim_arena", "use_arena"]

logger = logging.getLogger("scalesnn")

SWITCH = "SCALESNN_ARENA"
GLIBC_SWITCH = "MALLOC_MMAP_THRESHOLD_"
FLAGS = ("-std=c++17", "-O2")  # torch's headers need no more
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**30  # bytes; a block above it is still mapped by itself and given back


@cache
def use_arena() -> bool:
    """From here on, CPU tensors of this process lie in an arena (``arena.cpp``): freed memory is kept for
    the next step, up to the most bytes that were ever alive at once and a quarter more.

    By default glibc hands large blocks back to the system at once, which clears and maps every page of them
    anew at the next step; told to keep them, its heap splits and holds about twice of what is alive. After a
    large evaluation the arena may hold that peak on; ``trim_arena`` gives it back. GPU memory, pinned and
    shared memory are not touched. The arena is compiled on first use (seconds) and kept in the cache of the
    kernels; without a compiler glibc is told to keep freed blocks instead. A second call changes nothing.

    Returns:
        Whether the arena is in use. Nothing has changed where ``SCALESNN_ARENA=0`` or
        ``MALLOC_MMAP_THRESHOLD_`` is set in the environment, or where the system is not Linux.
    """
    if os.environ.get(SWITCH) == "0" or GLIBC_SWITCH in os.environ or sys.platform != "linux":
        return False
    try:
        if _library().arena_start():
            return True
        why = "the system reserves no addresses for it"
    except BUILD_ERRORS as error:
        why = reason(error)
    logger.warning(
        "no arena for CPU tensors (%s): the C library keeps freed blocks, in a heap that splits", why
    )
    _keep_freed_blocks()
    return False


def trim_arena() -> None:
    """Give the free memory of the arena back to the system, and forget the peak: for measurements, and after
    work that needed far more than what follows. Does nothing where the arena is not in use."""
    if use_arena.cache_info().currsize and use_arena():
        _library().arena_trim()


@cache
def _library() -> ctypes.CDLL:
    code = Path(__file__).with_name("arena.cpp").read_text(encoding="utf-8")
    return shared_library("arena", code, FLAGS)


def _keep_freed_blocks() -> None:
    """Where the C library is glibc, have it keep large blocks that are freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
