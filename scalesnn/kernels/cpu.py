"""The kernel source as a CPU library, built on first use (``kernels.build``)."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch

from scalesnn.kernels.build import BUILD_ERRORS, HAS_COMPILER, cache_folder, reason, shared_library
from scalesnn.kernels.source import SCALARS, scalar_of, source, surrogate_macros, symbol

__all__ = ["HAS_COMPILER", "available", "cache_folder", "call", "library"]

logger = logging.getLogger("scalesnn")

# No fused multiply-add: fp32 results equal torch's bit for bit. The other two let the compiler vectorise
# comparisons.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
)
FUNCTIONS = (
    *("forward", "statistics", "normalise_backward"),
    *("channel_sums", "coefficients", "channel_gradients", "pack", "unpack"),
)


@cache
def available() -> bool:
    """Whether the CPU kernels can be used here; says why not, once."""
    try:
        library(None)
    except BUILD_ERRORS as error:
        logger.warning("no fused CPU kernels (%s): neurons run in plain torch", reason(error))
        return False
    return True


@cache
def library(surrogate: str | None) -> ctypes.CDLL:
    """The backward kernel of a surrogate (``source.surrogate_key``), or with None all the other kernels.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    code = (surrogate_macros(surrogate) if surrogate is not None else "") + source("neuron_cpu.cpp")
    loaded = shared_library("neuron", code, FLAGS)
    for name in FUNCTIONS if surrogate is None else ("backward",):
        function = getattr(loaded, symbol(name))
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
        function.restype = None
    return loaded


@cache
def _function(name: str, surrogate: str | None, dtype: torch.dtype) -> tuple[Any, int]:
    return getattr(library(surrogate), symbol(name)), list(SCALARS.values()).index(scalar_of(dtype))


def call(name: str, dtype: torch.dtype, surrogate: str | None, arguments: bytes) -> None:
    """Run a kernel on CPU memory; ``arguments`` are packed (``source.unpacked``)."""
    function, kind = _function(name, surrogate, dtype)
    function(kind, torch.get_num_threads(), arguments)
