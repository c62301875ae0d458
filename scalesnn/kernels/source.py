"""The kernel source as text: its arguments, and the macros that choose a variant."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "IDENTITY",
    "SCALARS",
    "STEPS",
    "Variant",
    "constants",
    "fields",
    "pointers",
    "scalar_of",
    "source",
    "surrogate_key",
    "symbol",
    "unpacked",
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


def constants(numbers: Mapping[str, float]) -> bytes:
    """What a kernel is told beside its pointers: the packed numbers, in the order of ``fields()``, where 0 is
    what is not given. They stand before the pointers.

    Raises:
        KeyError: there is no such number.
    """
    kinds = [(name, kind) for name, kind in fields() if kind != "pointer"]
    unknown = numbers.keys() - {name for name, _ in kinds}
    if unknown:
        raise KeyError(f"no numbers of the kernels: {', '.join(sorted(unknown))}")
    convert = {"integer": int, "number": float}
    layout = "8x" + "".join("q" if kind == "integer" else "d" for _, kind in kinds)
    return struct.pack(layout, *(convert[kind](numbers.get(name, 0)) for name, kind in kinds))


@cache
def pointers(names: tuple[str, ...]) -> struct.Struct:
    """What packs the addresses of the fields ``names``, given in this order, behind ``constants``."""
    order = [name for name, kind in fields() if kind == "pointer"]
    places = [order.index(name) for name in names]
    if places != sorted(places):
        raise ValueError(f"{', '.join(names)} are not in the order of the kernel source")
    layout, done = "", 0
    for place in places:
        layout, done = layout + f"{8 * (place - done)}xQ", place + 1
    return struct.Struct(f"{layout}{8 * (len(order) - done)}x")


def unpacked(arguments: bytes) -> list[int | float]:
    """The values of ``fields()`` in packed arguments; 0 for a null pointer."""
    layout = "8x" + "".join({"integer": "q", "number": "d", "pointer": "Q"}[kind] for _, kind in fields())
    return list(struct.unpack(layout, arguments))


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


class Variant(NamedTuple):
    """What is known of a launch on a GPU when its module is compiled.

    Attributes:
        kernel: its name.
        surrogate: of 'backward', else None.
        lanes: neighbours that a thread takes at a time.
        steps: for how many steps the sweeps are unrolled.
        fixed_steps: how many steps there are; 0 where only the launch says.
        wide: offsets need 64 bits.
        channels_last, tau_is_power_of_2, v_reset_is_0: as they say; 1 / tau is exact then.
        others: as in the kernel source.
        given: the pointers that are there.
    """

    kernel: str
    dtype: torch.dtype
    surrogate: str | None = None
    lanes: int = 1
    steps: int = 1
    fixed_steps: int = 0
    wide: bool = False
    channels_last: bool = False
    tau_is_power_of_2: bool = False
    v_reset_is_0: bool = False
    charge: int = 0
    hard_reset: bool = False
    detach_reset: bool = False
    x_repeated: bool = False
    v_every_step: bool = False
    given: tuple[str, ...] = ()


KNOWN = ("charge", "hard_reset", "detach_reset", "x_repeated", "v_every_step")


def variant_source(*variant: Any) -> str:
    """The source of a GPU module with one kernel, to which all that a ``Variant`` knows is constant."""
    known = Variant(*variant)
    scalar = scalar_of(known.dtype)
    numbers = [f"u.{name} = {int(getattr(known, name))};" for name in KNOWN]
    if known.fixed_steps:
        numbers.append(f"u.steps = {known.fixed_steps};")
    if known.v_reset_is_0:
        numbers.append("u.v_reset = 0;")
    pointers = [name for name, kind in fields() if kind == "pointer"]
    numbers += [f"THERE(u.{name});" if name in known.given else f"u.{name} = nullptr;" for name in pointers]
    macros = {
        f"KERNEL_{known.kernel}": "",
        "SCALAR": scalar,
        "REAL": "double" if scalar == "double" else "float",
        "OFFSET": "long long" if known.wide else "int",
        "LANES": known.lanes,
        "STEPS": known.steps,
        "MIN_BLOCKS": _min_blocks(known),
        "CHANNELS_LAST": int(known.channels_last),
        "TAU_IS_POWER_OF_2": int(known.tau_is_power_of_2),
        "KNOWN": " ".join(numbers),
    }
    lines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    surrogate = "" if known.surrogate is None else surrogate_macros(known.surrogate)
    return lines + surrogate + source("neuron_gpu.cu")


def _min_blocks(variant: Variant) -> int:
    """Blocks that an SM must be able to hold: with 1 a thread has 255 registers, with 2 128."""
    learned = variant.kernel == "backward" and "decay" in variant.given  # has a sum more: 128 would spill
    most = 8 if learned and variant.steps * variant.lanes <= 16 else 4 if learned else 16
    return 1 if variant.dtype == torch.float64 or variant.steps > most else 2
