"""From tensors to kernels: memory layouts, packed arguments, and the choice between the CPU library and
CuPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalesnn.kernels import cpu, cuda
from scalesnn.kernels.source import IDENTITY, SCALARS, constants, pointers

__all__ = [
    "Layout",
    "available",
    "dense",
    "empty",
    "index_of",
    "layout_of",
    "like",
    "operator",
    "prepared",
    "real_dtype",
    "run",
    "slabs",
]

CPU_TILE = 512  # neurons, as LANES in the kernel source
CPU_SLABS = 32
KEPT = 4096  # prepared launches: kernels × modules × shapes


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
        return x.new_empty(shape, dtype=dtype)
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
    return _layout(x.shape, x.is_contiguous(), channels)


@lru_cache(KEPT)
def _layout(shape: torch.Size, contiguous: bool, channels: bool) -> Layout:
    size = math.prod(shape[1:])
    if not channels or len(shape) < 3:
        return Layout(size, 1, max(size, 1))
    return Layout(size, shape[2], max(math.prod(shape[3:]), 1) if contiguous else 1)


def on_gpu(tensor: Tensor) -> bool:
    """Whether kernels run on ``tensor`` by CuPy rather than by the CPU library."""
    return tensor.is_cuda


def index_of(x: Tensor) -> int:
    """The GPU on which kernels run on ``x``; -1: the CPU."""
    if not on_gpu(x):
        return -1
    index = x.device.index
    return torch.cuda.current_device() if index is None else index


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache(KEPT)
def slabs(layout: Layout, index: int) -> int:
    """In how many parts a sum over a channel is taken, on the GPU ``index`` or (-1) the CPU."""
    if index >= 0:
        return cuda.slabs_for(layout.channels, layout.inner, layout.size, _multiprocessors(index))
    return max(1, min(CPU_SLABS, layout.size // CPU_TILE))


def prepared(
    name: str,
    dtype: torch.dtype,
    index: int,
    layout: Layout,
    addresses: tuple[str, ...],
    numbers: Mapping[str, float],
    surrogate: str = IDENTITY,
) -> Callable[..., None]:
    """A kernel's launch, of which all but the addresses of tensors is packed; callers keep it.

    Args:
        name: the kernel.
        dtype, index: of the tensors (``index_of``).
        addresses: the names of the pointers that the launch takes, in the order of ``source.fields()``.
        numbers: of ``source.fields()``; 0 where not given.
        surrogate: of 'backward'.
    """
    told = {"size": layout.size, "channels": layout.channels, "inner": layout.inner, "slabs": 1, **numbers}
    packed, pack = constants(told), pointers(addresses)
    if index >= 0:
        return cuda.Launch(name, dtype, index, surrogate, told, addresses, packed, pack)
    key = surrogate if name == "backward" else None

    def launch(*at: int) -> None:
        cpu.call(name, dtype, key, packed + pack.pack(*at))

    return launch


@lru_cache(KEPT)
def _prepared(*key: Any) -> Callable[..., None]:
    name, dtype, index, layout, addresses, numbers = key
    return prepared(name, dtype, index, layout, addresses, dict(numbers))


def run(name: str, of: Tensor, layout: Layout, /, **given: Any) -> None:
    """Run 'pack' or 'unpack', prepared at the first call with these numbers.

    Args:
        name: the kernel.
        of: its device and dtype choose the code.
        layout: of the tensors.
        given: arguments of ``source.fields()``; tensors for the pointers, in their order.
    """
    if layout.size == 0:
        return
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    numbers = tuple((key, value) for key, value in given.items() if isinstance(value, int))
    launch = _prepared(name, of.dtype, index_of(of), layout, tuple(tensors), numbers)
    launch(*(tensor.data_ptr() for tensor in tensors.values()))


def direct(x: Tensor) -> bool:
    """Whether an operator's function may be called itself: nobody fakes, traces or records what goes through
    torch's dispatcher, which takes about ten times as long as the function."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def operator(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors, the first of which is one, an operator of torch.library, which is called
    only where that is needed (``direct``). Its attribute ``operator`` is torch's."""

    def decorate(function: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(f"scalesnn::{name}", function, mutates_args=tuple(mutates))

        @wraps(function)
        def call(x: Tensor, *others: Any) -> Any:
            return function(x, *others) if direct(x) else registered(x, *others)

        call.operator = registered  # type: ignore[attr-defined]
        return call

    return decorate
