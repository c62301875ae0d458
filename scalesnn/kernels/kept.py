"""Tensors as they are kept for a backward pass that makes them again: spikes as bits, others as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scalesnn.kernels import packing, spikes

__all__ = ["Spikes", "keep"]


class Spikes(NamedTuple):
    """The form of a tensor of spikes [T, …] that is kept as bits.

    Attributes:
        planes, shape, stride, dtype: as ``packing.unpack`` takes them.
        largest: the largest value: 1, or more where spikes have been added up.
    """

    planes: int
    largest: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def whole(self, bits: Tensor) -> Tensor:
        """The tensor, marked as spikes."""
        out = packing.unpack(bits, self.planes, self.shape, self.stride, self.dtype)
        return spikes.mark_spikes(out, self.largest, bits, self.planes)

    def bits_of_steps(self, bits: Tensor, a: int, b: int) -> Tensor | None:
        """The bits of the steps from ``a`` to ``b``; None where a step ends in the middle of a word."""
        if self.planes == 0:
            return bits[a:b]
        words, rest = divmod(self.stride[0], 32)
        return None if rest else bits[:, a * words : b * words].contiguous()

    def steps(self, bits: Tensor, a: int, b: int) -> Tensor:
        """The steps from ``a`` to ``b``, dense."""
        part = self.bits_of_steps(bits, a, b)
        if part is None:
            return packing.unpack(bits, self.planes, self.shape, self.stride, self.dtype)[a:b]
        return packing.unpack(part, self.planes, (b - a, *self.shape[1:]), self.stride, self.dtype)


def keep(x: Tensor) -> tuple[Tensor, Spikes | None]:
    """What to keep of ``x`` [T, …], and its form: the bits where it is known to be spikes, else ``x``."""
    if x.dim() == 0 or not x.is_floating_point() or x.numel() == 0 or x.stride(0) != x[0].numel():
        return x, None
    known = spikes.bits_of(x)
    if known is None:
        return x, None
    bits, planes = known
    return bits, Spikes(planes, spikes.is_spikes(x), tuple(x.shape), x.stride(), x.dtype)
