"""Which element a GPU thread takes: vectors and single lanes, all lengths of sweeps, offsets over 2^31."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_on_cpu import TYPES, GpuOnCpu, compile_shim
from oracle import ATAN, NEURONS, Neuron
from torch import Tensor
from variants import no_arguments, unit_variant

from scalesnn.kernels import cpu, cuda, launch, normalisation, ops
from scalesnn.kernels.records import UnitInputs
from scalesnn.kernels.source import fields, unpacked, variant_source

N = None


def results(x: Tensor, residual: Tensor | None, setting: Neuron) -> list[Tensor]:
    """Spikes, v, bits, dL/dy, dL/dv and sums of a BatchNorm unit, and dL/dx of given coefficients."""
    channels = x.shape[2]
    affine = torch.linspace(-0.3, 1.5, 4 * channels).view(4, channels)
    decay = torch.tensor(0.4) if setting.learned else None
    u = UnitInputs(x, affine, residual=residual, decay=decay, with_bits=True, neuron=setting.parameters)
    s, v, bits = ops.unit(u)
    grad = torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype)
    of_y, rows, of_v = ops.unit_backward(grad, torch.ones_like(v), u, True)
    of_x = normalisation.normalise_backward(of_y, x, affine, affine[1:3].contiguous())
    packed = normalisation.packed_sums(normalisation.statistics(x))
    means, within, between = packed[:-1].view(3, channels)  # how squares are split depends on the threads
    return [s, v, bits, of_y, of_v, of_x, rows.sum(0), means, within + between]


@pytest.mark.parametrize(
    ("T", "shape", "last", "dtype", "shift", "lanes"),
    [
        (9, (2, 8, 5, 6), True, torch.bfloat16, 0, 4),
        (5, (3, 6, 6, 6), False, torch.float32, 0, 4),
        pytest.param(16, (3, 68, 3, 5), True, torch.float32, 0, 4, marks=pytest.mark.long),
        pytest.param(17, (3, 8, 2, 6), False, torch.bfloat16, 0, 4, marks=pytest.mark.long),
        pytest.param(40, (1, 12, 3, 3), True, torch.bfloat16, 0, 4, marks=pytest.mark.long),
        pytest.param(3, (2, 132, 7, 4), True, torch.float32, 0, 4, marks=pytest.mark.long),
        pytest.param(7, (3, 5, 7, 7), False, torch.float16, 0, 1, marks=pytest.mark.long),  # rows of 49
        pytest.param(4, (3, 7, 5, 5), True, torch.float32, 0, 1, marks=pytest.mark.long),  # 7 channels
        (4, (2, 8, 4, 4), False, torch.bfloat16, 1, 1),  # x begins 2 bytes after a vector
    ],
)
def test_vectors_give_the_cpus_bits(
    T: int,
    shape: tuple[int, ...],
    last: bool,
    dtype: torch.dtype,
    shift: int,
    lanes: int,
    shim_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU's build is the plain reference: only sums over channels may differ, by rounding."""
    count = T * torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(count + shift, generator=generator).mul(1.3).to(dtype)[shift:].view(T, *shape)
    residual = torch.randn(x.shape, generator=generator).to(dtype)
    if last:
        x, residual = (
            t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
            for t in (x, residual)
        )
    setting = NEURONS[T % len(NEURONS)]
    expected = results(x, residual, setting)
    engine = GpuOnCpu(shim_folder)
    seen = []

    def call(name: str, *arguments: Any) -> None:
        engine.call(name, *arguments)
        seen.append(
            cuda.variant_of(name, dtype, ATAN, dict(zip(NAMES, unpacked(arguments[-1]), strict=True))).lanes
        )

    monkeypatch.setattr(cpu, "call", call)
    monkeypatch.setattr(launch, "slabs", engine.slabs)
    found = results(x, residual, setting)
    assert seen[0] == lanes
    for one, other in zip(found[:6], expected[:6], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(found[6:], expected[6:], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


NAMES = [name for name, _ in fields()]
CHANNELS, INNER, IMAGES, STEPS = 64, 4096, 4100, 2  # 2^30 and a little: two steps are more than 2^31
SIZE = CHANNELS * INNER * IMAGES
TILE = 1024  # elements of a block that takes one tile a thread


class Sparse:
    """Memory of which only what is written takes any: a tensor [STEPS, SIZE], or one step."""

    def __init__(self, dtype: type, elements: int) -> None:
        not_reserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, which Python names from 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | not_reserved
        self.memory = mmap.mmap(-1, elements * np.dtype(dtype).itemsize, flags=flags)
        self.array = np.frombuffer(self.memory, dtype)

    @property
    def pointer(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


def ends(array: np.ndarray, steps: int, size: int, count: int) -> list[np.ndarray]:
    """The last elements of every step."""
    return [array[(t + 1) * size - count : (t + 1) * size] for t in range(steps)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved")
def test_the_last_elements_of_more_than_2_to_the_31(shim_folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(STEPS, TILE, generator=generator) for _ in range(2))
    of_channel = torch.linspace(0.2, 1.4, 3 * CHANNELS).view(3, CHANNELS)
    small = [t.view(STEPS, 1, 1, TILE) for t in (x, grad)]
    affine = of_channel[:, -1:]
    u = UnitInputs(small[0], affine.contiguous(), with_bits=True, neuron=NEURONS[0].parameters)
    s, v, bits = ops.unit(u)
    of_y, rows, _ = ops.unit_backward(small[1], N, u)
    sums = rows.sum(0)

    memory = {name: Sparse(np.float32, STEPS * SIZE) for name in ("x", "spikes", "grad_spikes", "grad_x")}
    memory |= {"v": Sparse(np.float32, SIZE), "bits": Sparse(np.int32, STEPS * SIZE // 32)}
    for t in range(STEPS):
        ends(memory["x"].array, STEPS, SIZE, TILE)[t][:] = x[t].numpy()
        ends(memory["grad_spikes"].array, STEPS, SIZE, TILE)[t][:] = grad[t].numpy()
    slabs = SIZE // CHANNELS // TILE
    memory["partial"] = Sparse(np.float64, slabs * 3 * CHANNELS)
    shape = {"steps": STEPS, "size": SIZE, "channels": CHANNELS, "inner": INNER, "slabs": slabs}
    numbers = {"charge": 1, "hard_reset": 1, "tau": NEURONS[0].tau, "v_threshold": NEURONS[0].v_threshold}
    arguments = no_arguments() | shape | numbers | {"p0": 2.0}
    arguments |= {
        name: row.data_ptr() for name, row in zip(("mean", "scale", "bias"), of_channel, strict=True)
    }

    for kernel, names, grid in (
        ("forward", ("x", "spikes", "v", "bits"), (SIZE // TILE, 1)),
        ("backward", ("x", "grad_spikes", "grad_x", "partial"), (CHANNELS, slabs)),
    ):
        given = arguments | {name: memory[name].pointer for name in names}
        variant = cuda.variant_of(kernel, torch.float32, ATAN, given)
        assert variant.wide
        assert variant.lanes == 4
        library = compile_shim(variant_source(*variant), shim_folder)
        function = getattr(library, f"last_block_of_{kernel}")
        function.argtypes = [ctypes.c_int, ctypes.c_int, *(TYPES[kind] for _, kind in fields())]
        function(*grid, *given.values())

    for name, expected in (("spikes", s), ("grad_x", of_y)):
        for found, right in zip(ends(memory[name].array, STEPS, SIZE, TILE), expected, strict=True):
            assert torch.equal(torch.from_numpy(found.copy()), right.flatten())
    assert torch.equal(torch.from_numpy(memory["v"].array[-TILE:].copy()), v.flatten())
    words = ends(memory["bits"].array, STEPS, SIZE // 32, TILE // 32)
    assert torch.equal(torch.from_numpy(np.stack(words)), bits)
    of_last = memory["partial"].array.reshape(slabs, 3, CHANNELS)[-1, :, -1]
    torch.testing.assert_close(torch.from_numpy(of_last.copy()), sums[:, 0], rtol=1e-5, atol=1e-5)


def test_offsets_are_wide_only_where_32_bits_do_not_hold_them() -> None:
    def wide(size: int, steps: int) -> bool:
        arguments = no_arguments() | {"steps": steps, "size": size, "channels": 1, "inner": size, "tau": 1.0}
        return cuda.variant_of("forward", torch.float32, ATAN, arguments).wide

    assert not wide(1 << 20, 64)
    assert wide((1 << 31) - 4, 1), "a stride more would be beyond 2^31"
    assert wide(1 << 20, 1 << 11)


def test_what_a_variant_knows_is_what_the_launch_says() -> None:
    assert unit_variant("forward", torch.float32, 4).tau_is_power_of_2
    assert not unit_variant("forward", torch.float32, 4, tau=1.7).tau_is_power_of_2
    assert unit_variant("forward", torch.float32, 4).v_reset_is_0
    assert not unit_variant("forward", torch.float32, 4, v_reset=-0.0).v_reset_is_0
    assert not unit_variant("forward", torch.float32, 4, v_reset=0.1).v_reset_is_0
    assert unit_variant("forward", torch.bfloat16, 4, x=2).lanes == 1
    assert unit_variant("forward", torch.bfloat16, 4, x=8, bits=4).lanes == 4
    assert unit_variant("forward", torch.bfloat16, 4, v=8).lanes == 1, "v is float32"
    assert unit_variant("forward", torch.bfloat16, 4, scale=8).lanes == 1
    assert unit_variant("forward", torch.bfloat16, 4, scale=4, channels_last=False).lanes == 4
    assert unit_variant("forward", torch.float32, 17).steps == 16
    assert unit_variant("forward", torch.float32, 17).fixed_steps == 0
    assert unit_variant("normalise_backward", torch.float32, 16)[4:6] == (8, 16)
    assert unit_variant("backward", torch.float32, 17).steps == 32
