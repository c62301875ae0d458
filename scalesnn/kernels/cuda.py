"""The kernel source on a GPU: compiled by CuPy at run time, launched on torch's current stream, without
copies.

What CuPy compiles lies below the cache folder of the kernels, in a folder for each architecture, unless
CUPY_CACHE_DIR says else: CuPy's own place is the home folder, which may be read-only. One process compiles a
module while the others of the machine wait for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels.build import cache_folder, lock, reason
from scalesnn.kernels.source import STEPS, fields, symbol, variant_source

__all__ = [
    "HAS_CUPY",
    "OPTIONS",
    "THREADS",
    "available",
    "call",
    "launch_grid",
    "module_folder",
    "slabs_for",
    "variant_of",
    "why_not",
]

THREADS = 256  # of a block, as in the kernel source
# No fused multiply-add: the arithmetic of the CPU and of torch, but for denormals (CuPy adds -ftz=true).
OPTIONS = ("-std=c++17", "--fmad=false")
MOST_BLOCKS = 1 << 16
HAS_CUPY = importlib.util.find_spec("cupy") is not None


@cache
def available() -> bool:
    """Whether CuPy can be imported (``why_not`` says what is wrong)."""
    return why_not() is None


@cache
def why_not() -> str | None:
    """Why there is no CuPy, in one line; None where there is."""
    try:
        if "cupy" not in sys.modules:  # it makes its cache folder when it is imported
            os.environ.setdefault("CUPY_CACHE_DIR", str(module_folder()))
        import cupy  # noqa: F401
    except Exception as error:  # a broken installation raises all kinds
        return f"CuPy cannot be imported: {reason(error)}"
    return None


def module_folder() -> Path:
    """Where compiled modules are kept: machines with unlike GPUs may share a home folder."""
    architecture = "no-gpu"
    if torch.cuda.is_available():
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return cache_folder() / "cupy" / architecture


@cache
def _function(name: str, device: int, variant: tuple[Any, ...]) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return _module(device, variant).get_function(symbol(name))


@cache
def _module(device: int, variant: tuple[Any, ...]) -> Any:
    import cupy

    code = variant_source(*variant)
    module = cupy.RawModule(code=code, options=OPTIONS, backend="nvrtc")
    key = hashlib.sha256(code.encode()).hexdigest()[:24]
    with lock(cache_folder() / f"module_{key}.lock"):
        module.compile()  # or takes what another process has compiled
    return module


def slabs_for(channels: int, inner: int, size: int, multiprocessors: int) -> int:
    """In how many parts the positions of a channel are summed: enough blocks to fill the GPU eight times."""
    width = 32 if inner == 1 and channels > 1 else 1
    columns = -(-channels // width)
    rows = THREADS // width
    wanted = max(1, 8 * multiprocessors // columns)
    return max(1, min(wanted, -(-(size // channels) // rows), 65535))


def launch_grid(name: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """The blocks of a launch, from the kernel's arguments."""
    if name in ("statistics", "backward"):
        width = 32 if arguments["inner"] == 1 and arguments["channels"] > 1 else 1
        return -(-arguments["channels"] // width), arguments["slabs"]
    return max(1, min(-(-arguments["size"] // THREADS), MOST_BLOCKS)), 1


def variant_of(name: str, dtype: torch.dtype, surrogate: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of ``variant_source`` for a launch."""
    if name not in ("forward", "backward"):
        return dtype, None, 1, 0, False, False, False, True
    backward = name == "backward"
    return (
        dtype,
        surrogate if backward else None,
        min(STEPS, 1 << max(arguments["steps"] - 1, 0).bit_length()) if backward else 1,
        arguments["charge"],
        bool(arguments["hard_reset"]),
        bool(arguments["detach_reset"]) and backward,
        arguments["decay"] is not None,
        arguments["mean"] is not None,
    )


def call(name: str, x: Tensor, surrogate: str, arguments: dict[str, Any]) -> None:
    """Run a kernel on the GPU of ``x``.

    Args:
        name: the kernel.
        x: gives the dtype and the device.
        surrogate: ``source.surrogate_key``.
        arguments: every argument of ``source.fields()`` by name; pointers as integers, or None.
    """
    import cupy

    variant = variant_of(name, x.dtype, surrogate, arguments)
    values = [arguments[field] or 0 for field, _ in fields()]
    values = [float(v) if kind == "number" else int(v) for v, (_, kind) in zip(values, fields(), strict=True)]
    index = x.device.index if x.device.index is not None else torch.cuda.current_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    with torch.cuda.device(index), cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream, index):
        function = _function(name, index, variant)
        function(launch_grid(name, arguments), (THREADS,), (cupy.int32(0), *values))
