"""Spikes, and sums of a few, as bits: custom ops to pack them and to make the tensors again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalesnn.kernels.launch import layout_of, run

__all__ = ["pack", "unpack", "words_of"]


def words_of(size: int) -> int:
    """Words of 32 bits that hold ``size`` bits."""
    return (size + 31) // 32


@torch.library.custom_op("scalesnn::pack", mutates_args=())
def pack(x: Tensor, planes: int) -> Tensor:
    """Whole numbers 0 … 2^planes - 1 as bits, in the order in which they lie in memory: int32 [planes,
    words].

    ``x`` is dense (``launch.dense``). The bits of ``unit`` are those of one plane where its steps are
    multiples of 32 elements; ``unpack`` takes the number of rows into account.
    """
    size = x.numel()
    bits = x.new_empty((planes, words_of(size)), dtype=torch.int32)
    layout = layout_of(x.unsqueeze(0), channels=False)
    run("pack", x, layout._replace(size=size), steps=planes, x=x, bits=bits)
    return bits


@pack.register_fake
def _(x, planes):  # type: ignore[no-untyped-def]
    return x.new_empty((planes, words_of(x.numel())), dtype=torch.int32)


@torch.library.custom_op("scalesnn::unpack", mutates_args=())
def unpack(
    bits: Tensor, planes: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The tensor that was packed: ``shape``, ``stride`` and ``dtype`` are its own.

    ``bits`` are ``pack``'s, or, with ``planes`` 0, the rows that ``unit`` makes, one a time-step
    (``shape[0]`` of them, or a multiple where time and batch are one dimension).
    """
    out = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=bits.device)
    size = out.numel()
    rows = bits.shape[0] if planes == 0 else 1
    if size == 0:
        return out
    layout = layout_of(out.new_empty(1, 1), channels=False)._replace(size=size // rows)
    if planes or (size // rows) % 32 == 0:
        run("unpack", out, layout._replace(size=size), steps=max(planes, 1), spikes=out, bits=bits)
    else:
        flat = torch.as_strided(out, (rows, size // rows), (size // rows, 1))
        for row, part in zip(bits, flat, strict=True):
            run("unpack", out, layout, steps=1, spikes=part, bits=row)
    return out


@unpack.register_fake
def _(bits, planes, shape, stride, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=bits.device)
