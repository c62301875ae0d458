"""From tensors to kernels: memory layouts, argument lists, and the choice between the CPU library and
CuPy."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalesnn.kernels import cpu, cuda
from scalesnn.kernels.source import IDENTITY, SCALARS, fields

__all__ = ["Layout", "available", "dense", "empty", "layout_of", "like", "real_dtype", "run"]

CPU_TILE = 512  # neurons, as LANES in the kernel source
CPU_SLABS = 32


class Layout(NamedTuple):
    """How a tensor [T, N, C, …] lies in memory: ``size`` elements a step, ``inner`` neighbours of one
    channel."""

    size: int
    channels: int
    inner: int


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, of membranes and of coefficients: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernels run on tensors of this device and dtype."""
    if dtype not in SCALARS:
        return False
    if torch.compiler.is_compiling():  # which does not trace a build
        return {"cpu": cpu.HAS_COMPILER, "cuda": cuda.HAS_CUPY}.get(device.type, False)
    if device.type == "cpu":
        return cpu.available()
    return device.type == "cuda" and torch.version.cuda is not None and cuda.available()


def _channels_last(x: Tensor, channel: int = 2) -> bool:
    return x.dim() > channel + 1 and x.movedim(channel, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """``x`` [T, N, …], or a copy of it, contiguous or with its channels last in every step."""
    return x if x.is_contiguous() or _channels_last(x) else x.contiguous()


def empty(x: Tensor, steps: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the memory format of the dense ``x`` [T, N, …]: of ``steps`` time-steps, or with
    None one
    step [N, …]."""
    shape = x.shape[1:] if steps is None else (steps, *x.shape[1:])
    dtype = x.dtype if dtype is None else dtype
    if x.is_contiguous():
        return torch.empty(shape, dtype=dtype, device=x.device)
    channel = len(shape) - x.dim() + 2
    stride, size = [0] * len(shape), 1
    for d in (channel, *reversed(range(channel + 1, len(shape))), *reversed(range(channel))):
        stride[d], size = size, size * max(shape[d], 1)
    return torch.empty_strided(shape, stride, dtype=dtype, device=x.device)  # no view, which += would refuse


def like(tensor: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` [T, N, …] or [N, …], or a copy of it, in the memory format of the dense ``x`` [T, N, …] and
    ``dtype``
    (that of ``x`` where None)."""
    tensor = tensor.to(x.dtype if dtype is None else dtype)
    if x.is_contiguous():
        return tensor.contiguous()
    channel = tensor.dim() - x.dim() + 2
    if _channels_last(tensor, channel):
        return tensor
    steps = tensor.shape[0] if tensor.dim() == x.dim() else None
    return empty(x, steps, tensor.dtype).copy_(tensor)


def layout_of(x: Tensor, channels: bool) -> Layout:
    """The layout of a dense tensor [T, N, C, …]; with ``channels`` False all neurons count as one
    channel's."""
    size = x[0].numel()
    if not channels or x.dim() < 3:
        return Layout(size, 1, max(size, 1))
    if x.is_contiguous():
        return Layout(size, x.shape[2], max(x[0, 0, 0].numel() if size else 1, 1))
    return Layout(size, x.shape[2], 1)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def slabs(x: Tensor, layout: Layout) -> int:
    """In how many parts a sum over a channel is taken."""
    if x.device.type == "cuda":
        index = x.device.index if x.device.index is not None else torch.cuda.current_device()
        return cuda.slabs_for(layout.channels, layout.inner, layout.size, _multiprocessors(index))
    return max(1, min(CPU_SLABS, layout.size // CPU_TILE))


def run(name: str, of: Tensor, layout: Layout, surrogate: str = IDENTITY, /, **given: Any) -> Tensor | None:
    """Run a kernel.

    Args:
        name: 'forward', 'backward', 'statistics', 'normalise_backward', 'pack' or 'unpack'.
        of: its device and dtype choose the code.
        layout: of the tensors.
        surrogate: of 'backward'.
        given: arguments of ``source.fields()``; tensors for the pointers.

    Returns:
        for 'statistics' and 'backward' the three sums of every channel, float64 [3, channels].
    """
    sums = None
    arguments: dict[str, Any] = {key: None if kind == "pointer" else 0 for key, kind in fields()}
    arguments.update(size=layout.size, channels=layout.channels, inner=layout.inner, slabs=1)
    arguments.update({key: value for key, value in given.items() if not isinstance(value, Tensor)})
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    if name in ("statistics", "backward"):
        arguments["slabs"] = slabs(of, layout)
        tensors["partial"] = of.new_empty((arguments["slabs"], 3, layout.channels), dtype=torch.float64)
    arguments.update({key: value.data_ptr() for key, value in tensors.items()})
    if layout.size == 0:
        return torch.zeros_like(tensors["partial"][0]) if "partial" in tensors else None
    if of.device.type == "cuda":
        cuda.call(name, of, surrogate, arguments)
    else:
        values = [arguments[key] for key, _ in fields()]
        cpu.call(name, of.dtype, surrogate if name == "backward" else None, values)
    if "partial" in tensors:
        sums = tensors["partial"].sum(0)
    return sums
