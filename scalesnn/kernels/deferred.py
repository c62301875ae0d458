"""A tensor whose values are made only when an operation asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from scalesnn.kernels.normalisation import Sums
    from scalesnn.kernels.unit import NeuronParameters, Normalisation

__all__ = ["Deferred", "settle"]

HOOKS: set[Any] = {Tensor.register_hook, Tensor.retain_grad}
WITHOUT_VALUES: set[Any] = {
    *HOOKS,
    *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.is_floating_point, Tensor.detach),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf")
    ),
    *(getattr(Tensor, name).__get__ for name in ("_base", "_version", "is_cuda", "is_sparse", "grad")),
}
ADDITIONS = {Tensor.add, torch.add, Tensor.add_}


class Deferred(Tensor):
    """A tensor [T, N, …] with a place in autograd's graph, but without values.

    A normalisation or a neuron takes it apart and makes the values by a few time-steps at a time. For any
    other operation it becomes an ordinary tensor, from then on the same one. Subclasses define ``values``,
    ``another``, ``plus``, ``takes``, ``statistics`` and ``unit``.

    Attributes:
        hooked: somebody has a hook on its gradient, which therefore has to be made.
    """

    hooked: bool
    _plain: Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], stride: tuple[int, ...], like: Tensor, dtype: Any) -> Any:
        out = Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=dtype, device=like.device)
        out.hooked, out._plain = False, None
        return out

    def values(self) -> Tensor:
        """The values, without autograd."""
        raise NotImplementedError

    def another(self) -> Deferred:
        """A tensor like this one, without a place in the graph."""
        raise NotImplementedError

    def plus(self, other: Tensor) -> Tensor | None:
        """The sum, deferred too; None where it cannot be."""
        raise NotImplementedError

    def takes(self, norm: bool) -> bool:
        """Whether ``unit`` can run on it, with a normalisation or without."""
        raise NotImplementedError

    def statistics(self) -> Sums:
        """As ``normalisation.statistics``."""
        raise NotImplementedError

    def unit(
        self,
        neuron: NeuronParameters | None,
        v: Tensor | float,
        v_every_step: bool,
        norm: Normalisation | None,
        decay: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As ``unit.fused_unit``."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """The ordinary tensor; its gradient goes to this one's place in the graph."""
        if self._plain is not None:
            return self._plain
        out: Tensor = _Plain.apply(self)
        if torch.is_grad_enabled():
            self._plain = out
        return out

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in WITHOUT_VALUES:
            if func in HOOKS:
                args[0].hooked = True
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in ADDITIONS and not kwargs and len(args) == 2:
            a, b = args if isinstance(args[0], Deferred) else (args[1], args[0])
            if func is not Tensor.add_ or a is args[0]:
                total = a.plus(b) if isinstance(b, Tensor) else None
                if total is not None:
                    return total
        return func(*tree_map(_plain_of, args), **tree_map(_plain_of, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or func._schema.name == "aten::detach":  # what hooks of FSDP2 and ZeRO-3 do
            first = args[0]
            if len(args) == 1 or tuple(args[1]) == tuple(first.shape):
                out = first.another()
                out.hooked = first.hooked or first._plain is not None
                return out
        return func(*tree_map(_values_of, args), **tree_map(_values_of, kwargs or {}))


class _Plain(torch.autograd.Function):
    """From a Deferred tensor to its values."""

    @staticmethod
    def forward(ctx: Any, deferred: Deferred) -> Tensor:
        return deferred.values().data  # no view, which in-place operations would refuse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _plain_of(value: Any) -> Any:
    return value.plain() if isinstance(value, Deferred) else value


def _values_of(value: Any) -> Any:
    return value.values() if isinstance(value, Deferred) else value


def settle(x: Tensor, norm: bool) -> Tensor:
    """``x`` itself; an ordinary tensor where it is a Deferred one that a unit cannot take apart.

    Args:
        norm: the unit begins with a normalisation.
    """
    if not isinstance(x, Deferred):
        return x
    alone = x.hooked or x._plain is not None or not x.requires_grad
    return x.plain() if alone or not x.takes(norm) else x
