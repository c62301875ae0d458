"""The kernel source on a GPU: compiled by CuPy at run time, launched on torch's current stream, without
copies.

What CuPy compiles lies below the cache folder of the kernels, in a folder for each architecture, unless
CUPY_CACHE_DIR says else: CuPy's own place is the home folder, which may be read-only. One process compiles a
module while the others of the machine wait for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import math
import os
import struct
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

from scalesnn.kernels.build import cache_folder, lock, reason
from scalesnn.kernels.source import STEPS, Variant, fields, symbol, variant_source

__all__ = [
    "HAS_CUPY",
    "OPTIONS",
    "THREADS",
    "Launch",
    "available",
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
COLUMNS = 8  # channels of a block where channels are finished, as in the kernel source
FINISHING = ("channel_sums", "coefficients", "channel_gradients")  # what becomes of a channel's sums
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
    if variant.kernel in FINISHING:
        return -(-arguments["channels"] // COLUMNS), 1
    if variant.kernel in ("statistics", "backward"):
        return -(-arguments["channels"] // (CHANNELS if variant.channels_last else 1)), arguments["slabs"]
    return max(1, min(-(-arguments["size"] // (THREADS * variant.lanes)), MOST_BLOCKS)), 1


def variant_of(name: str, dtype: torch.dtype, surrogate: str, arguments: dict[str, Any]) -> Variant:
    """What is known of a launch beforehand, from the kernel's arguments."""
    steps, given = arguments["steps"], tuple(field for field in pointers() if arguments[field])
    if name in FINISHING:
        return Variant(name, dtype, given=given)
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


_threads = threading.local()  # which GPUs' contexts a thread has


class Launch:
    """A kernel's launch on the GPU ``index``, on torch's current stream.

    Its parameters lie in one buffer, of which a call writes the addresses. Which of these are null, and how
    they are aligned, may choose the variant.

    Args:
        name: the kernel. dtype: of the tensors. surrogate: ``source.surrogate_key``.
        numbers: of ``source.fields()``, by their names. addresses: the names of the pointers of a call.
        packed: the numbers (``source.constants``). pack: of the addresses (``source.pointers``).
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        index: int,
        surrogate: str,
        numbers: dict[str, Any],
        addresses: tuple[str, ...],
        packed: bytes,
        pack: struct.Struct,
    ) -> None:
        from cupy_backends.cuda.api import driver

        self.name, self.dtype, self.surrogate = name, dtype, surrogate
        self.index, self.numbers, self.addresses = index, numbers, addresses
        self.pack_into, self.start = pack.pack_into, len(packed)
        self.parameters = ctypes.create_string_buffer(packed + bytes(pack.size), len(packed) + pack.size)
        self.size = ctypes.c_size_t(len(self.parameters))
        pointers = (ctypes.addressof(self.parameters), ctypes.addressof(self.size))
        # CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END of cuLaunchKernel's ``extra``
        self.extra = (ctypes.c_void_p * 5)(1, pointers[0], 2, pointers[1], None)
        self.at = ctypes.addressof(self.extra)
        self.lock = threading.Lock()  # from the writing of addresses to the driver's copy of them
        self.kernels: dict[tuple[int, ...], tuple[Any, int, int]] = {}  # and their grids
        self.driver = driver

    def __call__(self, *addresses: int) -> None:
        if torch._C._cuda_getDevice() != self.index:
            with torch.cuda.device(self.index):
                self(*addresses)
            return
        if self.index not in getattr(_threads, "ready", ()):
            _make_context(self.index)
        key = tuple([address and 1 + address % 16 for address in addresses])
        kernel, columns, rows = self.kernels.get(key) or self._find(key, addresses)
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        with self.lock:
            self.pack_into(self.parameters, self.start, *addresses)
            self.driver.launchKernel(kernel, columns, rows, 1, THREADS, 1, 1, 0, stream, 0, self.at)

    def _find(self, key: tuple[int, ...], addresses: tuple[int, ...]) -> tuple[Any, int, int]:
        """Compile the kernel, or load it."""
        arguments = dict.fromkeys((field for field, _ in fields()), 0)
        arguments |= self.numbers | dict(zip(self.addresses, addresses, strict=True))
        variant = variant_of(self.name, self.dtype, self.surrogate, arguments)
        kernel = _function(self.index, variant).kernel.ptr
        self.kernels[key] = (kernel, *launch_grid(variant, arguments))
        return self.kernels[key]


def _make_context(index: int) -> None:
    """Have the GPU's context be this thread's, also where the thread has called nothing of CUDA's yet."""
    import cupy

    cupy.cuda.Device(index).use()
    cupy.cuda.runtime.free(0)
    _threads.ready = {*getattr(_threads, "ready", ()), index}
