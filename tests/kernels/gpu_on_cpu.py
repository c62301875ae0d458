"""The GPU's build of the kernel source, run on the CPU through cuda_shim.h."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from scalesnn.kernels import cuda, launch
from scalesnn.kernels.source import IDENTITY, fields, unpacked, variant_source

CHECKS = ("-fsanitize=bounds,alignment", "-fsanitize-undefined-trap-on-error")  # of arrays, of loads
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", *CHECKS)
TYPES = {"integer": ctypes.c_longlong, "number": ctypes.c_double, "pointer": ctypes.c_void_p}


def compile_shim(code: str, folder: Path) -> ctypes.CDLL:
    """Build a variant's source behind the shim: ``launch_KERNEL`` and, for a grid's last block,
    ``last_block_of_KERNEL``."""
    here = Path(__file__).parent
    name = re.findall(r"#define KERNEL_(\w+)", code)[0]
    launcher = (
        f'extern "C" void launch_{name}(int columns, int rows FIELDS(AS_PARAMETER)) {{\n'
        f"    shim::run_grid(columns, rows, THREADS, [&] {{ scalesnn_{name}(0 FIELDS(AS_VALUE)); }});\n}}\n"
        f'extern "C" void last_block_of_{name}(int columns, int rows FIELDS(AS_PARAMETER)) {{\n'
        f"    const unsigned last = columns * rows - 1;\n"
        f"    shim::run_blocks(columns, rows, THREADS, last, last, "
        f"[&] {{ scalesnn_{name}(0 FIELDS(AS_VALUE)); }});\n}}\n"
    )
    text = f'#include "{here / "cuda_shim.h"}"\n' + code + launcher
    name = hashlib.sha256(text.encode() + (here / "cuda_shim.h").read_bytes()).hexdigest()[:24]
    library = folder / f"shim_{name}.so"
    if not library.exists():
        source = folder / f"shim_{name}.cpp"
        source.write_text(text, encoding="utf-8")
        subprocess.run(["g++", *FLAGS, str(source), "-o", str(library)], check=True, timeout=120)
    return ctypes.CDLL(str(library))


class GpuOnCpu:
    """Stands in for the CPU library: takes the path of ``cuda.call``, and runs the GPU's drivers."""

    def __init__(self, folder: Path, multiprocessors: int = 1) -> None:
        self.folder = folder
        self.multiprocessors = multiprocessors
        self.calls: list[str] = []
        self.variant = cache(self._variant)

    def _variant(self, variant: tuple[Any, ...]) -> ctypes.CDLL:
        return compile_shim(variant_source(*variant), self.folder)

    def slabs(self, layout: launch.Layout, index: int) -> int:
        """As on a GPU with few multiprocessors."""
        return cuda.slabs_for(layout.channels, layout.inner, layout.size, self.multiprocessors)

    def call(self, name: str, dtype: torch.dtype, surrogate: str | None, packed: bytes) -> None:
        """In the place of ``cpu.call``."""
        values = unpacked(packed)
        arguments = dict(zip([field for field, _ in fields()], values, strict=True))
        variant = cuda.variant_of(name, dtype, surrogate or IDENTITY, arguments)
        function = getattr(self.variant(variant), f"launch_{name}")
        function.argtypes = [ctypes.c_int, ctypes.c_int, *(TYPES[kind] for _, kind in fields())]
        function.restype = None
        self.calls.append(name)
        function(*cuda.launch_grid(variant, arguments), *values)
