"""What is known about a tensor beside its values: that it is spikes, that it is one step repeated, that it
is a
normalised tensor. Layers that keep their input for the backward pass keep the cheapest form of it.

The knowledge hangs on the tensor that a fused op made, as attributes; operations on the tensor give tensors
without it,
and a change in place makes it void. So nothing is ever kept as bits that is not known to be spikes.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from scalesnn.kernels import packing

__all__ = [
    "add",
    "bits_of",
    "is_spikes",
    "mark_affine",
    "mark_repeated",
    "mark_spikes",
    "marked",
]

# Wrappers such as ZeRO-3's hooks hand a layer an alias of the tensor that was marked; it is found by its
# address, while the marked one lives.
_by_address: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def _mark(tensor: Tensor, **marks: object) -> Tensor:
    for name, value in marks.items():
        setattr(tensor, f"scalesnn_{name}", value)
    if not torch.compiler.is_compiling():
        tensor.scalesnn_version = _version(tensor)  # type: ignore[attr-defined]
        if _has_address(tensor):
            _by_address[tensor.data_ptr()] = tensor
    return tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _has_address(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def marked(tensor: Tensor) -> Tensor:
    """The tensor itself or the one it is an alias of, whichever carries marks that still hold."""
    if torch.compiler.is_compiling():
        return tensor
    if not hasattr(tensor, "scalesnn_version"):
        other = _by_address.get(tensor.data_ptr()) if _has_address(tensor) else None
        if other is None or not hasattr(other, "scalesnn_version"):
            return tensor
        if other.shape != tensor.shape or other.stride() != tensor.stride():
            return tensor
        if (
            other.dtype != tensor.dtype
            or other.device != tensor.device
            or other.data_ptr() != tensor.data_ptr()
        ):
            return tensor
        if _version(other) != _version(tensor):
            return tensor
        tensor = other
    if tensor.scalesnn_version != _version(tensor):  # changed in place since
        for name in ("largest", "bits", "once", "normalised", "affine", "version"):
            if hasattr(tensor, f"scalesnn_{name}"):
                delattr(tensor, f"scalesnn_{name}")
    return tensor


def mark_spikes(tensor: Tensor, largest: int = 1, bits: Tensor | None = None) -> Tensor:
    """Say that ``tensor`` holds whole numbers 0 … ``largest``; ``bits`` are those of ``ops.unit``."""
    _mark(tensor, largest=largest)
    if bits is not None:
        _mark(tensor, bits=bits)
    return tensor


def mark_repeated(tensor: Tensor, once: Tensor) -> Tensor:
    """Say that ``tensor`` is ``once`` expanded over a new first dimension."""
    return _mark(tensor, once=once)


def mark_affine(tensor: Tensor, x: Tensor, affine: Tensor) -> Tensor:
    """Say that ``tensor`` is ``ops.normalise(x, affine)``."""
    return _mark(tensor, normalised=x, affine=affine)


def is_spikes(tensor: Tensor) -> int:
    """The largest value of a tensor that is known to be spikes or a sum of spikes; 0 where nothing is
    known."""
    return getattr(marked(tensor), "scalesnn_largest", 0)


def bits_of(tensor: Tensor) -> tuple[Tensor, int] | None:
    """The spikes as bits and the number of planes (0: rows of ``ops.unit``), for ``packing.unpack``.

    None: not spikes.

    Sums of spikes, and spikes that came without bits, are packed at the first call.
    """
    tensor = marked(tensor)
    largest = getattr(tensor, "scalesnn_largest", 0)
    if not largest:
        return None
    bits = getattr(tensor, "scalesnn_bits", None)
    if bits is not None:
        return bits, getattr(tensor, "scalesnn_planes", 0)
    planes = largest.bit_length()
    bits = packing.pack(tensor.detach(), planes)
    if planes == 1 and tensor[0].numel() % 32 == 0:  # then the plane is the rows of ops.unit
        bits, planes = bits.view(tensor.shape[0], -1), 0
    tensor.scalesnn_bits = bits  # type: ignore[attr-defined]
    tensor.scalesnn_planes = planes  # type: ignore[attr-defined]
    return bits, planes


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``; the sum of spikes is known to be one (at most 255)."""
    total = a + b
    largest = is_spikes(a) + is_spikes(b)
    if is_spikes(a) and is_spikes(b) and largest < 256:
        mark_spikes(total, largest)
    return total
