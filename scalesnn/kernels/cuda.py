"""The kernel source on a GPU: compiled by CuPy at run time, launched on torch's current stream, without
copies.

What CuPy compiles lies below the cache folder of the kernels, in a folder for each architecture, unless
CUPY_CACHE_DIR says else: CuPy's own place is the home folder, which may be read-only. One process compiles a
module while the others of the machine wait for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels.build import cache_folder, lock, reason
from scalesnn.kernels.source import STEPS, Variant, fields, symbol, variant_source

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
MOST_BLOCKS = 1 << 11  # in which a thread then takes several tiles
LANES = 4  # neighbours that a thread takes at a time, if it can
CHANNELS = 64  # of a block that sums over channels that are neighbours in memory
MOST_STEPS = 16  # for which the sweeps are unrolled; the backward sweep's chunk for more is STEPS
MOST_BYTES = 64  # of an input in a thread's registers, in the backward sweep
SMALL = (1 << 31) - (1 << 24)  # elements, and a stride, whose offsets fit 32 bits
# What is read and written as vectors: in the tensors' dtype; in that of the arithmetic; the last of these in
# channels_last only.
AS_TENSORS = ("x", "residual", "spikes", "grad_spikes", "grad_x")
AS_POTENTIALS = ("v", "v_start", "grad_v", "grad_v_start", "chunk_v")
AS_COEFFICIENTS = ("mean", "scale", "bias", "mean_grad", "slope_grad")
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
def _function(device: int, variant: Variant) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return _module(device, variant).get_function(symbol(variant.kernel))


@cache
def _module(device: int, variant: Variant) -> Any:
    import cupy

    code = variant_source(*variant)
    module = cupy.RawModule(code=code, options=OPTIONS, backend="nvrtc")
    key = hashlib.sha256(code.encode()).hexdigest()[:24]
    with lock(cache_folder() / f"module_{key}.lock"):
        module.compile()  # or takes what another process has compiled
    return module


def slabs_for(channels: int, inner: int, size: int, multiprocessors: int) -> int:
    """In how many parts the positions of a channel are summed: enough blocks to fill the GPU eight times."""
    width = CHANNELS if inner == 1 and channels > 1 else 1
    columns = -(-channels // width)
    rows = THREADS * LANES // width
    wanted = max(1, 8 * multiprocessors // columns)
    return max(1, min(wanted, -(-(size // channels) // rows), 65535))


def launch_grid(variant: Variant, arguments: dict[str, Any]) -> tuple[int, int]:
    """The blocks of a launch, from the kernel's arguments."""
    if variant.kernel in ("statistics", "backward"):
        return -(-arguments["channels"] // (CHANNELS if variant.channels_last else 1)), arguments["slabs"]
    return max(1, min(-(-arguments["size"] // (THREADS * variant.lanes)), MOST_BLOCKS)), 1


def variant_of(name: str, dtype: torch.dtype, surrogate: str, arguments: dict[str, Any]) -> Variant:
    """What is known of a launch beforehand, from the kernel's arguments."""
    steps, given = arguments["steps"], tuple(field for field in pointers() if arguments[field])
    most = MOST_STEPS // 2 if name == "normalise_backward" else MOST_STEPS  # two inputs: half as many of each
    unrolled = steps if steps <= most else STEPS if name == "backward" else most
    neuron = name in ("forward", "backward")
    last = arguments["inner"] == 1 and arguments["channels"] > 1
    return Variant(
        name,
        dtype,
        surrogate if name == "backward" else None,
        _lanes(name, dtype, unrolled, arguments),
        1 if name == "unpack" else unrolled,
        steps if steps <= MOST_STEPS and name != "unpack" else 0,
        max(steps, 1) * arguments["size"] > SMALL,
        last,
        neuron and math.frexp(arguments["tau"])[0] == 0.5,
        neuron and math.copysign(1.0, arguments["v_reset"]) > 0 == arguments["v_reset"],
        arguments["charge"] if neuron else 0,
        neuron and bool(arguments["hard_reset"]),
        name == "backward" and bool(arguments["detach_reset"]),
        neuron and bool(arguments["x_repeated"]),
        neuron and bool(arguments["v_every_step"]),
        given,
    )


@cache
def pointers() -> tuple[str, ...]:
    """The kernels' arguments that are pointers."""
    return tuple(field for field, kind in fields() if kind == "pointer")


def _lanes(name: str, dtype: torch.dtype, steps: int, arguments: dict[str, Any]) -> int:
    """How many neighbours a thread takes: whole vectors of a row, aligned, and in the backward sweep no more
    than it has registers for."""
    lanes, row = LANES, arguments["inner"] if arguments["inner"] > 1 else arguments["channels"]
    if name == "backward":
        while lanes > 1 and lanes * steps * dtype.itemsize > MOST_BYTES:
            lanes //= 2
    in_real = AS_POTENTIALS + (AS_COEFFICIENTS if arguments["inner"] == 1 else ())
    if row % lanes or any(
        (arguments[field] or 0) % min(16, lanes * size)
        for size, names in ((dtype.itemsize, AS_TENSORS), (max(dtype.itemsize, 4), in_real))
        for field in names
    ):
        return 1
    return lanes


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
        function = _function(index, variant)
        function(launch_grid(variant, arguments), (THREADS,), (cupy.int32(0), *values))
