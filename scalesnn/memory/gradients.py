"""Gradients of sequences, chunk by chunk: what the backward of the fused ops does where a sequence is Lazy.

The gradient of a convolution's input, of a normalisation, and, where memory is dear, of a unit, are Lazy:
recipes, run each time a chunk is asked for. Kept are the gradients that residual connections bring together,
one sequence at a time, in the place of the one before (``lazy.Kept``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels import normalisation, ops, packing
from scalesnn.memory.lazy import (
    Chunk,
    Kept,
    Lazy,
    Lease,
    Options,
    chunk_of,
    done,
    reader,
    spans,
    strides_of_sequence,
)

__all__ = [
    "FEW",
    "SUMS",
    "Borders",
    "add",
    "kept_gradient",
    "lazy_gradient",
    "normalise_backward",
    "normalise_backward_",
    "options_of",
    "part_of",
    "unit_backward",
]

FEW = 4  # chunks; with no more, units' gradients are kept rather than made three times
SUMS = ("aten::add", "aten::add_")


def options_of(*tensors: Tensor | None) -> Options:
    """The options of the first that is Lazy."""
    return next(t.options for t in tensors if isinstance(t, Lazy))


def part_of(x: Tensor, repeats: int, a: int, b: int) -> tuple[Tensor, int]:
    """The chunk of a unit's input, and how often it is repeated."""
    return (reader(x)(a, b), 1) if repeats == 1 else (reader(x)(0, 1), b - a)


def lazy_gradient(like: Tensor, make: Chunk, options: Options, *of: Tensor | None, deeper: int = 0) -> Lazy:
    """The gradient of ``like``, which ``make`` makes from the gradients ``of``."""
    lazy = Lazy(tuple(like.shape), like.stride(), like.dtype, like.device, make, options)
    gradients = [x for x in of if isinstance(x, Lazy)]
    return lazy.is_gradient(_sequences(*gradients), max((x.depth for x in gradients), default=0) + deeper)


def kept_gradient(like: Tensor, kept: Kept, options: Options) -> Lazy:
    """The gradient of ``like``, whose chunks are kept."""
    lazy = Lazy(tuple(like.shape), like.stride(), like.dtype, like.device, kept, options)
    return lazy.is_gradient([kept])


def _sequences(*gradients: Tensor | None) -> set[Kept]:
    found = [x.lease for x in gradients if isinstance(x, Lazy) and x.lease is not None]
    return {kept for lease in found for kept in lease.sequences}


# ------------------------------------------------------------------------------------------------------ sums
def add(a: Any, b: Any) -> Tensor | None:
    """Two gradients of one tensor; None where they are not."""
    lazy = a if isinstance(a, Lazy) else b
    if not isinstance(lazy, Lazy) or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    if lazy.lease is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return None
    of_a, of_b = reader(a), reader(b)

    def make(start: int, end: int) -> Tensor:
        return of_a(start, end) + of_b(start, end)

    return kept_gradient(lazy, Kept(a.shape[0], lazy.steps, make, Lease(_sequences(a, b))), lazy.options)


# ------------------------------------------------------------------------------------------------------ unit
class Borders:
    """The potentials before every chunk, to be asked for last chunk first.

    Args:
        forward: a chunk's span and the potentials before it → those after it.
        sparse: keep a few at a time, as many as the number of chunks has binary digits, and make the others
            again, by halves.
    """

    def __init__(
        self,
        forward: Callable[[int, int, Any], Any],
        v: Any,
        chunks: list[tuple[int, int]],
        sparse: bool,
    ) -> None:
        self._forward, self._chunks, self._sparse = forward, chunks, sparse
        self._kept = {0: v}
        for index in range(0 if sparse else len(chunks) - 1):
            self._kept[index + 1] = v = forward(*chunks[index], v)

    def __call__(self, index: int) -> Any:
        """Before chunk ``index``."""
        if self._sparse:
            self._kept = {i: v for i, v in self._kept.items() if i <= index}
        at = max(i for i in self._kept if i <= index)
        while at < index:
            v, middle = self._kept[at], (at + index + 1) // 2
            for i in range(at, middle):
                v = self._forward(*self._chunks[i], v)
            self._kept[middle], at = v, middle
        return self._kept[index]


class _UnitGradient:
    """The gradient of a unit's normalised input, a chunk at a time, the last first.

    The gradient of the potentials is carried from a chunk to the one before it; a chunk that is asked for out
    of order is made after all that come later.

    Args:
        run: a chunk's index, the gradient carried to it and, where it is at hand, the chunk of ``x`` → the
            chunk of the gradient, its sums over channels, and the gradient to be carried on.
        x: the unit's input. cut: nothing is carried.
    """

    def __init__(
        self,
        run: Callable[[int, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]],
        x: Tensor,
        chunks: list[tuple[int, int]],
        cut: bool,
    ) -> None:
        self.x, self._cut = x, cut
        self.part: tuple[int, int, Tensor] | None = None  # of x, steps a to b, for the next call
        self._run, self._chunks = run, chunks
        self._last = len(chunks)  # the chunk made last, what was carried to it, and on from it
        self._before: Tensor | None = None
        self._after: Tensor | None = None

    def __call__(self, a: int, b: int) -> Tensor:
        """Steps ``a`` to ``b``, a chunk or a part of one."""
        index = a // self._chunks[0][1]
        first = self._chunks[index][0]
        return self.chunk(index)[0][a - first : b - first]

    def chunk(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk, its sums, and the gradient of the potentials before it."""
        if index == self._last:
            carried = self._before
        else:
            if index != self._last - 1:
                self._last, self._before, self._after = len(self._chunks), None, None
                for later in range(len(self._chunks) - 1, index, -1):
                    self.chunk(later)
            carried = self._after
        part, self.part = self.part, None
        x = part[2] if part is not None and part[:2] == self._chunks[index] else None
        out = self._run(index, carried, x)
        self._last, self._before = index, carried
        self._after = None if self._cut else out[2]
        return out


class _Unit:
    """``ops.unit_backward`` a chunk of time at a time: its arguments, of which some are Lazy."""

    def __init__(self, grad_spikes: Tensor | None, grad_v: Any, x: Tensor, rest: tuple[Any, ...]) -> None:
        self.x, self.grad_v = x, grad_v
        self.mean, self.scale, self.bias, self.residual, self.bits, self.v, self.decay, *settings = rest
        (
            self.repeats,
            self.charge,
            *reset,
            self.every,
            self.with_grad_v_start,
            self.surrogate,
            self.parameters,
        ) = settings
        self.neuron = (self.charge, *reset)
        self.options = options_of(x, self.residual, grad_spikes)
        self.total = x.shape[0] * self.repeats
        steps = self.options.steps
        if self.repeats > 1 and isinstance(grad_spikes, Lazy) and grad_spikes.depth == 0:
            steps = max(steps // 4, 1)  # x, one image, is at hand: small chunks cost nothing, and are large
        self.chunks = list(spans(self.total, steps))
        for sequence in _sequences(grad_spikes):  # what it is made of goes before potentials come
            sequence.make_from()
        # not the tensor: its lease would last
        self.of_spikes = None if grad_spikes is None else reader(grad_spikes)

    @property
    def has_residual(self) -> bool:
        """Whether something was added to the normalised input."""
        return self.residual is not None or self.bits is not None

    def borders(self) -> Callable[[int], Tensor | None]:
        """The potentials before every chunk. Not an attribute: a cycle of references would end late."""
        if not self.charge:
            return lambda index: None
        if isinstance(self.x, Lazy) and self.x.borders:
            return self.x.borders[0].__getitem__
        # where all steps are one image, potentials are larger than what makes them
        return Borders(self.forward, self.v, self.chunks, sparse=self.repeats > 1)

    def forward(self, a: int, b: int, v: Tensor | None) -> Tensor:
        """The potentials after steps ``a`` to ``b``, from those before."""
        part, times = part_of(self.x, self.repeats, a, b)
        residual = chunk_of(self.residual, a, b)
        if residual is None and self.bits is not None:
            residual = packing.unpack(self.bits[a:b], 0, tuple(part.shape), part.stride(), part.dtype)
        return ops.unit(
            part, self.mean, self.scale, self.bias, residual, None, None, None, v, self.decay, None, None,
            times, *self.neuron, False, False, self.surrogate, self.parameters, "",
        )[1]  # fmt: skip

    def backward(
        self, borders: Callable[[int], Tensor | None], index: int, carried: Tensor | None, part: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``_UnitGradient`` runs, with the potentials before every chunk."""
        a, b = self.chunks[index]
        part, times = part_of(self.x, self.repeats, a, b) if part is None else (part, 1)
        return ops.unit_backward(
            None if self.of_spikes is None else self.of_spikes(a, b), self._of_v(a, b, carried), part,
            self.mean, self.scale, self.bias, chunk_of(self.residual, a, b),
            None if self.bits is None else self.bits[a:b],
            borders(index), self.decay, times, *self.neuron, self.every,
            bool(self.charge) and (index > 0 or self.with_grad_v_start), self.surrogate, self.parameters,
        )  # fmt: skip

    def _of_v(self, a: int, b: int, carried: Tensor | None) -> Tensor | None:
        """The gradient of a chunk's potentials: of the last ones, or of those of every step."""
        if not self.every:
            return self.grad_v if b == self.total else carried
        if self.grad_v is None and carried is None:
            return None
        if self.grad_v is None:
            assert carried is not None
            of_v = torch.zeros((b - a, *carried.shape), dtype=carried.dtype, device=carried.device)
        else:
            of_v = self.grad_v[a:b].clone()
        if carried is not None:
            of_v[-1] += carried
        return of_v


def unit_backward(grad_spikes: Tensor | None, grad_v: Any, x: Tensor, *rest: Any) -> Any:
    """``ops.unit_backward``: the sums over channels now, of grad_y what later sweeps have it made of."""
    unit = _Unit(grad_spikes, grad_v, x, rest)
    run = partial(unit.backward, unit.borders())
    gradient = _UnitGradient(run, x, unit.chunks, unit.options.detach or not unit.charge)
    later = _is_made_later(unit, grad_spikes)
    kept, dense = Kept(unit.total, unit.options.steps), None
    sums: Tensor | None = None
    start: Tensor | None = None
    for index in reversed(range(len(unit.chunks))):
        a, b = unit.chunks[index]
        of_y, of_sums, start = gradient.chunk(index)
        sums = of_sums if sums is None else sums + of_sums
        if unit.repeats > 1:
            dense = of_y if dense is None else dense.add_(of_y)
        elif isinstance(x, Lazy) and not later:
            kept.put(a, of_y)
        elif not later:
            if dense is None:
                shape, stride = (unit.total, *of_y.shape[1:]), strides_of_sequence(of_y)
                dense = torch.empty_strided(shape, stride, dtype=of_y.dtype, device=of_y.device)
            dense[a:b] = of_y
        del of_y
    done(x, unit.residual)
    if not unit.with_grad_v_start or start is None:
        start = torch.empty(0, dtype=x.dtype, device=x.device)
    if dense is not None:
        return dense, sums, start
    if not later:
        return kept_gradient(x, kept, unit.options), sums, start
    return _later_gradient(unit, gradient, grad_spikes), sums, start


def _is_made_later(unit: _Unit, grad_spikes: Tensor | None) -> bool:
    """Whether the gradient of a unit's normalised input is made again where it is read, rather than kept."""
    if not unit.charge:
        return True
    if not isinstance(unit.x, Lazy) or unit.repeats > 1 or not isinstance(grad_spikes, Lazy):
        return False
    if unit.options.at_once:
        return False
    # one Lazy unit after another would make it many times over
    lean = not unit.options.keep_borders and len(unit.chunks) > FEW
    return unit.has_residual or (lean and grad_spikes.depth == 0)


def _later_gradient(unit: _Unit, gradient: _UnitGradient, grad_spikes: Tensor | None) -> Lazy:
    """The gradient of a unit's normalised input, to be made where it is read."""
    if not unit.charge:
        assert grad_spikes is not None
        assert unit.of_spikes is not None
        return lazy_gradient(grad_spikes, unit.of_spikes, unit.options, grad_spikes)
    if unit.has_residual:
        lease = Lease(_sequences(grad_spikes))
        return kept_gradient(unit.x, Kept(unit.total, unit.options.steps, gradient, lease), unit.options)
    return lazy_gradient(unit.x, gradient, unit.options, grad_spikes, deeper=1)


# ------------------------------------------------------------------------------------------------- normalise
def _normalised(grad: Tensor, x: Tensor, mean: Any, scale: Any, coefficients: Any) -> Chunk:
    of_grad, of_x = reader(grad), reader(x)

    def make(a: int, b: int) -> Tensor:
        part = of_x(a, b)
        unit = of_grad.source if isinstance(of_grad, Kept) else of_grad
        if isinstance(unit, _UnitGradient) and unit.x is x:
            unit.part = (a, b, part)
        of_part = of_grad(a, b)
        if isinstance(unit, _UnitGradient):
            unit.part = None
        if isinstance(of_grad, _UnitGradient):  # made for this call
            normalisation.normalise_backward_(of_part, part, mean, scale, coefficients)
            return of_part
        return normalisation.normalise_backward(of_part, part, mean, scale, coefficients)

    return make


def normalise_backward(grad: Tensor, x: Tensor, mean: Any, scale: Any, coefficients: Any) -> Tensor:
    """``normalisation.normalise_backward``, Lazy."""
    make = _normalised(grad, x, mean, scale, coefficients)
    if x.shape[0] == 1:
        return make(0, 1)
    out = lazy_gradient(x, make, options_of(grad, x), grad)
    return out if isinstance(x, Lazy) else out.whole()


def normalise_backward_(grad: Tensor, x: Tensor, mean: Any, scale: Any, coefficients: Any) -> None:
    """``normalisation.normalise_backward_``: over the chunks where they are there and nobody else's."""
    if not isinstance(grad, Lazy):
        for a, b in spans(x.shape[0], options_of(x).steps):
            normalisation.normalise_backward_(grad[a:b], reader(x)(a, b), mean, scale, coefficients)
    elif isinstance(grad.make, Kept) and grad.make.is_made and grad.make.readers == 1:
        for a, b in spans(x.shape[0], grad.steps):
            normalisation.normalise_backward_(grad.make(a, b), reader(x)(a, b), mean, scale, coefficients)
    else:
        grad.make = _normalised(grad, x, mean, scale, coefficients)
