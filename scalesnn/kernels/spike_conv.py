"""Convolutions of spikes on the CPU from their bits, by tables of sums: spike_conv.cpp says how.

The result is that of a product up to the order of additions, the same for any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from scalesnn.kernels import cpu
from scalesnn.kernels.build import shared_library

__all__ = ["convolve", "library", "products", "suits", "weight_gradient"]

SOURCE = Path(__file__).with_name("spike_conv.cpp")
MULTIPLE = 32  # of input and output channels: a word of bits, the width of a table
TURNED = 2**22  # bytes of turned bits at a time, of the weight's gradient
_looks_up = True


@contextmanager
def products() -> Iterator[None]:
    """Inside, convolutions are multiplied, as on a GPU: for plans of other devices than the CPU."""
    global _looks_up
    before, _looks_up = _looks_up, False
    try:
        yield
    finally:
        _looks_up = before


def suits(x: Tensor, planes: int, weight: Tensor, groups: int) -> bool:
    """Whether the convolution of spikes ``x`` [N, C, H, W] with ``weight`` can be looked up.

    Args:
        planes: of the bits (``packing.unpack``); sums of spikes have more than one.
    """
    return (
        _looks_up
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == weight.dtype
        and planes <= 1
        and groups == 1
        and x.shape[1] % MULTIPLE == weight.shape[0] % MULTIPLE == 0
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and cpu.available()
    )


def convolve(
    shape: Sequence[int],
    bits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``torch.conv2d`` of the spikes of ``shape`` [N, C, H, W] whose bits are given; channels_last.

    Raises:
        RuntimeError: the kernel is larger than the padded images.
    """
    geometry, size = _geometry(shape, weight, stride, padding, dilation)
    if min(size) < 1:
        raise RuntimeError(f"the kernel {tuple(weight.shape[2:])} is larger than the images {tuple(shape)}")
    form = (shape[0], weight.shape[0], *size)
    out = torch.empty(form, dtype=weight.dtype, memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    pointers = (bits.contiguous().data_ptr(), weight.data_ptr(), bias if bias is None else bias.data_ptr())
    _call("forward", weight.dtype, geometry, *pointers, out.data_ptr())
    return out


def weight_gradient(
    grad: Tensor,
    shape: Sequence[int],
    bits: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of ``convolve``'s weight, in the weight's memory format.

    Args:
        grad: of the output, [N, outputs, H, W].
    """
    out = torch.empty_like(weight)
    geometry, _ = _geometry(shape, out, stride, padding, dilation)
    grad, bits = grad.to(weight.dtype).contiguous(memory_format=torch.channels_last), bits.contiguous()
    inputs = weight[0].numel()
    positions = -(-grad.shape[0] * grad[0, 0].numel() // MULTIPLE) * MULTIPLE
    at_a_time = min(positions, max(TURNED // (4 * inputs), 1) * MULTIPLE)
    turned = torch.empty(at_a_time // MULTIPLE * inputs, dtype=torch.int32)
    sums = torch.empty(weight.numel(), dtype=weight.dtype)
    pointers = [tensor.data_ptr() for tensor in (bits, grad, out, turned, sums)]
    _call("weight_gradient", weight.dtype, geometry, at_a_time, *pointers)
    return out


def _geometry(
    shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[ctypes.Array[ctypes.c_longlong], tuple[int, int]]:
    """The source's ``struct Convolution``, and the output's height and width."""
    images, channels, *image = shape
    outputs, _, *kernel = weight.shape
    height, width = (
        (size + 2 * pad - dilate * (taps - 1) - 1) // step + 1
        for size, pad, dilate, taps, step in zip(image, padding, dilation, kernel, stride, strict=True)
    )
    numbers = [images, *image, channels, outputs, *kernel, *stride, *padding, *dilation, height, width]
    numbers += weight.stride()
    return (ctypes.c_longlong * len(numbers))(*numbers), (height, width)


@cache
def library() -> ctypes.CDLL:
    """The compiled source.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    return shared_library("spike_conv", SOURCE.read_text(encoding="utf-8"), cpu.FLAGS)


def _call(name: str, dtype: torch.dtype, geometry: object, *values: int | None) -> None:
    function = getattr(library(), name)
    kind = int(dtype == torch.float64)
    function(kind, torch.get_num_threads(), geometry, *map(ctypes.c_void_p, values))
