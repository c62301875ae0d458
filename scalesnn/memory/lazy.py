"""A sequence [T, N, …] that is not there: its chunks are made when they are asked for.

Operations that do not know it get the whole sequence. The fused ops (statistics, unit, and their backward) go
through it chunk by chunk, carrying potentials forward and their gradients back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scalesnn.kernels import ops

__all__ = ["Chunk", "Lazy", "chunk_of", "handle", "strides_of_sequence"]

Chunk = Callable[[int, int], Tensor]
ALIASES = ("aten::detach", "aten::alias", "aten::view", "aten::_unsafe_view")


class Lazy(Tensor):
    """A tensor of which only the recipe of its chunks is kept.

    Attributes:
        make: from the first step and the one after the last to a dense chunk [K, N, …].
        steps: K. options: K, whether no gradient goes back over chunk borders, whether potentials are kept.
        borders: the potentials before every chunk, where they are kept. rows: a max-pool's output as bits.
    """

    make: Chunk
    steps: int
    options: tuple[int, bool, bool]
    borders: list[list[Tensor | None]]
    rows: Tensor

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Chunk,
        options: tuple[int, bool, bool],
        borders: list[list[Tensor | None]] | None = None,
    ) -> Lazy:
        lazy = Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=dtype, device=device)
        lazy.make, lazy.options = make, options
        lazy.steps = options[0]
        lazy.borders = [] if borders is None else borders
        return lazy

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Lazy({tuple(self.shape)}, {self.dtype}, {self.steps} steps at a time)"

    def same(self) -> Lazy:
        """Another tensor of the same recipe."""
        return Lazy(
            tuple(self.shape), self.stride(), self.dtype, self.device, self.make, self.options, self.borders
        )

    def whole(self) -> Tensor:
        """The dense sequence."""
        out = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        for a, b in spans(self.shape[0], self.steps):
            out[a:b] = self.make(a, b)
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return handle(func, args, kwargs or {})


def spans(total: int, steps: int) -> Iterator[tuple[int, int]]:
    """The chunks of ``total`` time-steps."""
    return ((a, min(a + steps, total)) for a in range(0, total, steps))


def chunk_of(x: Tensor | None, a: int, b: int) -> Tensor | None:
    """Steps ``a`` to ``b`` of a sequence, lazy or dense."""
    if x is None:
        return None
    return x.make(a, b) if isinstance(x, Lazy) else x[a:b]


def strides_of_sequence(chunk: Tensor) -> tuple[int, ...]:
    """The strides that a sequence has whose chunks are like ``chunk``."""
    return (chunk[0].numel(), *chunk.stride()[1:])


def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of which an argument is Lazy."""
    name = func._schema.name
    if name in HANDLERS:
        return HANDLERS[name](*args)
    first = args[0] if args else None
    if isinstance(first, Lazy):
        if name in ALIASES and (len(args) == 1 or tuple(args[1]) == tuple(first.shape)):
            return first.same()
        if name == "aten::unsqueeze" and args[1] == 0:
            stride = (first.numel(), *first.stride())
            return Lazy((1, *first.shape), stride, first.dtype, first.device, first.make, first.options)
    dense: dict[int, Tensor] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, Lazy):
            return value
        if id(value) not in dense:
            dense[id(value)] = value.whole()
        return dense[id(value)]

    return func(*tree_map(whole, args), **tree_map(whole, kwargs))


def _options(*tensors: Tensor | None) -> tuple[int, bool, bool]:
    return next(t.options for t in tensors if isinstance(t, Lazy))


def _part(x: Tensor, repeats: int, a: int, b: int) -> tuple[Tensor, int]:
    """The chunk of a unit's input, and how often it is repeated."""
    if repeats == 1:
        part = chunk_of(x, a, b)
        assert part is not None
        return part, 1
    return (x.make(0, 1) if isinstance(x, Lazy) else x), b - a


def _batch_statistics(x: Lazy) -> Tensor:
    """Chunk by chunk, merged as Chan, Golub and LeVeque do."""
    count, mean, squares = 0, None, None
    for a, b in spans(x.shape[0], x.steps):
        part = x.make(a, b) if x.shape[0] > 1 else x.make(0, 1)
        moments, n = ops.batch_statistics(part), b - a
        if mean is None or squares is None:
            count, mean, squares = n, moments[0], moments[1] * n
            continue
        total, difference = count + n, moments[0] - mean
        squares = squares + moments[1] * n + difference.square() * (count * n / total)
        mean, count = mean + difference * (n / total), total
    assert mean is not None
    assert squares is not None
    return torch.stack([mean, squares / count])


def _unit(x: Tensor, mean: Any, scale: Any, bias: Any, residual: Any, *rest: Any) -> Any:
    _bits, residual_x, _affine, v, decay, _inverse, _count, repeats, charge, *neuron = rest
    v_init, tau, v_threshold, v_reset, detach_reset, every, _with_bits, surrogate, parameters, _group = neuron
    options = _options(x, residual, residual_x)
    total = x.shape[0] * repeats

    def run(a: int, b: int, v: Tensor | None, pack: bool) -> tuple[Tensor, Tensor, Tensor]:
        part, times = _part(x, repeats, a, b)
        return ops.unit(
            part, mean, scale, bias, chunk_of(residual, a, b), None, None, None, v, decay, None, None, times,
            charge, v_init, tau, v_threshold, v_reset, detach_reset, every, pack, surrogate, parameters, "",
        )  # fmt: skip

    shape = (total, *x.shape[1:])
    if not charge:  # the normalised sequence itself: made again wherever it is used
        stride = (x[0:1].numel() if not isinstance(x, Lazy) else x.stride(0), *x.stride()[1:])
        out = Lazy(shape, stride, x.dtype, x.device, lambda a, b: run(a, b, None, False)[0], options)
        empty = torch.empty(0, dtype=x.dtype, device=x.device)
        return out, empty, torch.empty((0, 0), dtype=torch.int32, device=x.device)
    borders: list[Tensor | None] = []
    packed: list[Tensor] = []
    potentials: list[Tensor] = []
    like = None
    for a, b in spans(total, options[0]):
        borders.append(v)
        like, v_out, words = run(a, b, v, True)
        packed.append(words)
        if every:
            potentials.append(v_out)
        v = v_out[-1] if every else v_out
    assert like is not None
    if options[2] and isinstance(x, Lazy):
        x.borders[:] = [borders]
    rows, step_shape, stride, dtype = torch.cat(packed), tuple(like.shape[1:]), like.stride(), like.dtype

    def spikes(a: int, b: int) -> Tensor:
        return ops.unpack(rows[a:b], 0, (b - a, *step_shape), stride, dtype)

    out = Lazy(shape, strides_of_sequence(like), dtype, x.device, spikes, options)
    return out, torch.cat(potentials) if every else v, rows


def _unit_backward(grad_spikes: Any, grad_v: Any, x: Tensor, *rest: Any) -> Any:
    mean, scale, bias, residual, bits, v, decay, repeats, charge, v_init, tau, *neuron = rest
    v_threshold, v_reset, detach_reset, every, with_grad_v_start, surrogate, parameters = neuron
    steps, detach, _ = _options(x, residual, grad_spikes)
    total = x.shape[0] * repeats
    parts = list(spans(total, steps))
    borders = x.borders[0] if isinstance(x, Lazy) and x.borders else None
    if borders is None:
        borders = [v]
        for a, b in parts[:-1] if charge else ():
            part, times = _part(x, repeats, a, b)
            res = _residual(residual, bits, part, a, b)
            borders.append(
                ops.unit(
                    part, mean, scale, bias, res, None, None, None, borders[-1], decay, None, None, times,
                    charge, v_init, tau, v_threshold, v_reset, detach_reset, False, False, surrogate,
                    parameters, "",
                )[1]
            )  # fmt: skip
    grad_y: Tensor | None = None
    sums: Tensor | None = None
    carried = None if every else grad_v
    start: Tensor | None = None
    for index in reversed(range(len(parts))):
        a, b = parts[index]
        part, times = _part(x, repeats, a, b)
        of_v = carried
        if every and grad_v is not None:
            of_v = grad_v[a:b].clone()
            if carried is not None:
                of_v[-1] += carried
        elif every and carried is not None:
            of_v = torch.zeros((b - a, *carried.shape), dtype=carried.dtype, device=carried.device)
            of_v[-1] = carried
        of_bits = None if bits is None else bits[a:b]
        of_y, of_sums, start = ops.unit_backward(
            chunk_of(grad_spikes, a, b), of_v, part, mean, scale, bias, chunk_of(residual, a, b), of_bits,
            borders[index] if charge else None, decay, times, charge, v_init, tau, v_threshold, v_reset,
            detach_reset, every, bool(charge) and (index > 0 or with_grad_v_start), surrogate, parameters,
        )  # fmt: skip
        carried = None if detach or not charge else start
        sums = of_sums if sums is None else sums + of_sums
        if repeats > 1:
            grad_y = of_y if grad_y is None else grad_y + of_y
        else:
            if grad_y is None:
                shape, stride = (total, *of_y.shape[1:]), strides_of_sequence(of_y)
                grad_y = torch.empty_strided(shape, stride, dtype=of_y.dtype, device=of_y.device)
            grad_y[a:b] = of_y
    if not with_grad_v_start or start is None:
        start = torch.empty(0, dtype=x.dtype, device=x.device)
    return grad_y, sums, start


def _residual(residual: Any, bits: Any, part: Tensor, a: int, b: int) -> Tensor | None:
    """The residual's chunk, dense."""
    if residual is not None or bits is None:
        return chunk_of(residual, a, b)
    return ops.unpack(bits[a:b], 0, tuple(part.shape), part.stride(), part.dtype)


def _normalise_backward(grad: Tensor, x: Tensor, mean: Any, scale: Any, coefficients: Any) -> Tensor:
    steps = _options(grad, x)

    def part(a: int, b: int) -> Tensor:
        of_grad, of_x = chunk_of(grad, a, b), chunk_of(x, a, b)
        assert of_grad is not None
        assert of_x is not None
        return ops.normalise_backward(of_grad, of_x, mean, scale, coefficients)

    if x.shape[0] == 1:
        return part(0, 1)
    return Lazy(tuple(x.shape), x.stride(), x.dtype, x.device, part, steps)


def _normalise_backward_in_place(grad: Tensor, x: Lazy, mean: Any, scale: Any, coefficients: Any) -> None:
    for a, b in spans(x.shape[0], x.steps):
        ops.normalise_backward_(grad[a:b], x.make(a, b), mean, scale, coefficients)


HANDLERS: dict[str, Callable[..., Any]] = {
    "scalesnn::batch_statistics": _batch_statistics,
    "scalesnn::unit": _unit,
    "scalesnn::unit_backward": _unit_backward,
    "scalesnn::normalise_backward": _normalise_backward,
    "scalesnn::normalise_backward_": _normalise_backward_in_place,
}
