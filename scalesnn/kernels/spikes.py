"""What is known about a tensor beside its values: that it is spikes, that it is one step repeated, that it
is a
normalised tensor. Layers that keep their input for the backward pass keep the cheapest form of it.

The knowledge hangs on the tensor that a fused op made, as attributes, and on its storage, where the aliases
find it that hooks of ZeRO-3 and FSDP2 hand on in its place. Operations on the tensor give tensors without it,
and a change in place makes it void. So nothing is ever kept as bits that is not known to be spikes.
"""

from __future__ import annotations

from typing import Any

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


def _mark(tensor: Tensor, **marks: object) -> Tensor:
    for name, value in marks.items():
        setattr(tensor, f"scalesnn_{name}", value)
    if not torch.compiler.is_compiling():
        tensor.scalesnn_version = _version(tensor)  # type: ignore[attr-defined]
        if _has_storage(tensor):
            marks.pop("once", None)  # an alias as well: the storage would hold itself
            storage: Any = tensor.untyped_storage()
            form, known = _form(tensor), getattr(storage, "scalesnn_marks", None)
            storage.scalesnn_marks = (form, marks if known is None or known[0] != form else known[1] | marks)
    return tensor


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What the aliases of a tensor have in common."""
    place = tensor.storage_offset(), _version(tensor)
    return (tensor.shape, tensor.stride(), tensor.dtype, *place)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _has_storage(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def marked(tensor: Tensor) -> Tensor:
    """The tensor itself, with the marks that still hold, its own or those of the tensor it is an alias of."""
    if torch.compiler.is_compiling():
        return tensor
    if not hasattr(tensor, "scalesnn_version"):
        # .data is no view and a leaf: its version would not tell of changes in place
        alias = _has_storage(tensor) and (tensor._is_view() or not tensor.is_leaf)
        known = getattr(tensor.untyped_storage(), "scalesnn_marks", None) if alias else None
        if known is not None and known[0] == _form(tensor):
            for name, value in known[1].items():
                setattr(tensor, f"scalesnn_{name}", value)
            tensor.scalesnn_version = _version(tensor)  # type: ignore[attr-defined]
        return tensor
    if tensor.scalesnn_version != _version(tensor):  # changed in place since
        for name in ("largest", "bits", "planes", "once", "normalised", "affine", "version"):
            if hasattr(tensor, f"scalesnn_{name}"):
                delattr(tensor, f"scalesnn_{name}")
    return tensor


def mark_spikes(tensor: Tensor, largest: int = 1, bits: Tensor | None = None, planes: int = 0) -> Tensor:
    """Say that ``tensor`` holds whole numbers 0 … ``largest``; ``bits`` and ``planes`` are those of
    ``packing.unpack``."""
    if bits is None:
        return _mark(tensor, largest=largest)
    return _mark(tensor, largest=largest, bits=bits, planes=planes)


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
    _mark(tensor, bits=bits, planes=planes)
    return bits, planes


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``; the sum of spikes is known to be one (at most 255)."""
    total = a + b
    largest = is_spikes(a) + is_spikes(b)
    if is_spikes(a) and is_spikes(b) and largest < 256:
        mark_spikes(total, largest)
    return total
