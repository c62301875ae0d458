"""Policy ``layer``: a convolution's output is not kept for the backward pass but made again from its input.

While a net runs, every convolution whose input is spikes leaves a recipe for its output. Where autograd
then saves that output (BatchNorm or the fused unit keeps its input), the recipe is kept in its place: the
module and the input's bits. Nothing else is run again, so that statistics are not taken twice and no random
number is drawn. Other tensors that are known to be spikes are kept as bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from scalesnn import layer
from scalesnn.kernels import ops, packing, spikes

__all__ = ["KeptSpikes", "ambient", "kept_as_recipes"]

Recipe = Callable[[], Tensor]
SMALLEST = 4096  # elements; anything less is kept as it is


def ambient(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes a context with the autocast settings of now."""
    enabled, cache = torch.is_autocast_enabled(device_type), torch.is_autocast_cache_enabled()
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache)


class KeptSpikes:
    """A tensor of spikes [T, …] kept as its bits."""

    def __init__(self, tensor: Tensor) -> None:
        known = spikes.bits_of(tensor)
        assert known is not None
        self.bits, self.planes = known
        self.largest = spikes.is_spikes(tensor)
        self.shape, self.stride, self.dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype

    def steps(self, a: int, b: int) -> Tensor:
        """Steps ``a`` to ``b``, dense."""
        if self.planes:  # sums of spikes are packed as one
            return self()[a:b]
        part = packing.unpack(self.bits[a:b], 0, (b - a, *self.shape[1:]), self.stride, self.dtype)
        return spikes.mark_spikes(part, self.largest, self.bits[a:b])

    def __call__(self) -> Tensor:
        """The tensor, with its marks."""
        out = packing.unpack(self.bits, self.planes, self.shape, self.stride, self.dtype)
        spikes.mark_spikes(out, self.largest, self.bits)
        out.scalesnn_planes = self.planes
        return out


@dataclass
class _Entry:
    """What is known about a storage: the recipe of the tensor that a convolution put there."""

    storage: StorageWeakRef
    version: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    recipe: Recipe

    def fits(self, tensor: Tensor) -> bool:
        return bool(
            not self.storage.expired()
            and tensor._version == self.version
            and tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.storage_offset() == self.offset
        )


class _Recipes:
    """Recipes by storage. A StorageWeakRef keeps the address from being used again."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def add(self, tensor: Tensor, recipe: Recipe) -> None:
        storage = tensor.untyped_storage()
        self._entries = {key: e for key, e in self._entries.items() if not e.storage.expired()}
        self._entries[storage._cdata] = _Entry(
            StorageWeakRef(storage),
            tensor._version,
            tensor.shape,
            tensor.stride(),
            tensor.storage_offset(),
            recipe,
        )

    def find(self, tensor: Tensor) -> Recipe | None:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry.recipe if entry is not None and entry.fits(tensor) else None


def _run_again(module: nn.Module, x: Recipe, context: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """The convolution's output, through the module's own call, in which ZeRO-3 gathers its weight."""
    with torch.no_grad(), context():
        return module(x())


def _affine(x: Recipe, affine: Tensor) -> Tensor:
    return ops.normalise(x(), affine)


@contextmanager
def kept_as_recipes(net: nn.Module, only: frozenset[str] | None = None) -> Iterator[None]:
    """Inside, what autograd saves of ``net``'s forward is kept as recipes where there is one.

    Args:
        only: names of the convolutions to run again; None: all whose input is spikes.
    """
    recipes = _Recipes()

    def remember(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = inputs[0]
        if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not spikes.is_spikes(x):
            return
        if output.dim() == 5 and output.stride(0) != 0 and output.shape[0] == x.shape[0]:
            recipes.add(output, partial(_run_again, module, KeptSpikes(x), ambient(x.device.type)))

    def pack(tensor: Tensor) -> Any:
        if tensor.numel() < SMALLEST or isinstance(tensor, nn.Parameter):
            return tensor
        recipe = recipes.find(tensor)
        if recipe is not None:
            return recipe
        known = spikes.marked(tensor)
        if hasattr(known, "scalesnn_affine"):
            x, affine = known.scalesnn_normalised, known.scalesnn_affine  # type: ignore[attr-defined]
            recipe = recipes.find(x)
            return partial(_affine, (lambda: x) if recipe is None else recipe, affine)
        if spikes.is_spikes(tensor) and tensor.is_floating_point() and tensor.stride(0) != 0:
            return KeptSpikes(tensor)
        return tensor

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    handles = [
        module.register_forward_hook(remember)
        for name, module in net.named_modules()
        if isinstance(module, layer.Conv2d) and (only is None or name in only)
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()
