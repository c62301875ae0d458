"""The kernel source as text: its arguments, and the macros that choose a variant."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import torch

__all__ = [
    "IDENTITY",
    "SCALARS",
    "STEPS",
    "fields",
    "scalar_of",
    "source",
    "surrogate_key",
    "symbol",
    "variant_source",
]

IDENTITY = "|real(1)"  # the key of the surrogate whose derivative is 1
STEPS = 32  # charges that the backward sweep holds at a time; longer sequences go in chunks of this many
SCALARS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "fp16"}
MOST_PARAMETERS = 4  # p0 … p3 of the kernel's arguments


@cache
def source(drivers: str = "") -> str:
    """The kernel source: neuron.cu, and after it ``drivers``, 'neuron_gpu.cu' or 'neuron_cpu.cpp'.

    A file in the folder that SCALESNN_KERNEL_SOURCE names goes before the package's (the mutation test has
    one).
    """
    folders = [Path(__file__).parent]
    if os.environ.get("SCALESNN_KERNEL_SOURCE"):
        folders.insert(0, Path(os.environ["SCALESNN_KERNEL_SOURCE"]))
    names = ("neuron.cu", drivers) if drivers else ("neuron.cu",)
    files = [next(folder / name for folder in folders if (folder / name).exists()) for name in names]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def symbol(name: str) -> str:
    """The name that a kernel has in both builds, and in a profiler's list: scalesnn_NAME."""
    return f"scalesnn_{name}"


@cache
def fields() -> tuple[tuple[str, str], ...]:
    """Name and kind ('integer', 'number' or 'pointer') of every kernel argument, in order, from the
    source."""
    table = source().split("#define FIELDS(F)")[1].split("#define AS_FIELD")[0]
    kinds = {"i64": "integer", "double": "number", "const void*": "pointer", "void*": "pointer"}
    return tuple((name, kinds[kind]) for kind, name in re.findall(r"F\(([\w *]+), (\w+)\)", table))


def surrogate_key(expression: str, names: tuple[str, ...]) -> str:
    """What names a surrogate to the ops: its parameters' names and its C++ expression, in one string.

    Raises:
        ValueError: more parameters than the kernels take.
    """
    if len(names) > MOST_PARAMETERS:
        raise ValueError(f"a surrogate has at most {MOST_PARAMETERS} parameters, got {', '.join(names)}")
    return ",".join(names) + "|" + expression


def scalar_of(dtype: torch.dtype) -> str:
    """The C++ type of a dtype.

    Raises:
        TypeError: the kernels do not know the dtype.
    """
    if dtype not in SCALARS:
        known = ", ".join(str(known).removeprefix("torch.") for known in SCALARS)
        raise TypeError(f"the fused kernels take {known}, got {str(dtype).removeprefix('torch.')}")
    return SCALARS[dtype]


def surrogate_macros(key: str) -> str:
    """The lines that give the source a surrogate (see ``surrogate_key``)."""
    names, expression = key.split("|", 1)
    parameters = [f"const real {name} = p{i};" for i, name in enumerate(filter(None, names.split(",")))]
    return f"#define SURROGATE_PARAMETERS {' '.join(parameters)}\n#define SURROGATE ({expression})\n"


def variant_source(
    dtype: torch.dtype,
    surrogate: str | None,
    steps: int,
    charge: int,
    hard_reset: bool,
    detach_reset: bool,
    parametric: bool,
    normalised: bool,
) -> str:
    """The source of a GPU module in which everything that is known beforehand is a constant.

    Args:
        surrogate: makes a module with the backward kernel; None one with all the others.
        steps: for how many time-steps the backward sweep is unrolled.
        others: as in the kernel source.
    """
    scalar = scalar_of(dtype)
    macros = {
        "VARIANT": "",
        "SCALAR": scalar,
        "REAL": "double" if scalar == "double" else "float",
        "STEPS": steps,
        "CHARGE": charge,
        "HARD_RESET": int(hard_reset),
        "DETACH_RESET": int(detach_reset),
        "PARAMETRIC": int(parametric),
        "NORMALISED": int(normalised),
    }
    lines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return lines + (surrogate_macros(surrogate) if surrogate is not None else "") + source("neuron_gpu.cu")
