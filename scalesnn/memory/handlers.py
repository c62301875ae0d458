"""What operations do with a ``Lazy`` sequence.

Those that do not know it get the whole sequence. The fused ops (statistics, unit, and their backward) go
through it chunk by chunk, carrying potentials forward and their gradients back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scalesnn.kernels import normalisation, ops, packing
from scalesnn.kernels.spikes import mark_spikes
from scalesnn.memory import gradients
from scalesnn.memory.gradients import options_of, part_of
from scalesnn.memory.lazy import Lazy, chunk_of, done, spans, strides_of_sequence

__all__ = ["handle"]

ALIASES = ("aten::detach", "aten::alias", "aten::view", "aten::_unsafe_view")


def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of which an argument is Lazy."""
    name = func._schema.name
    if name in HANDLERS:
        return HANDLERS[name](*args)
    if name in gradients.SUMS and not kwargs and (total := gradients.add(*args)) is not None:
        return total
    first = args[0] if args else None
    if isinstance(first, Lazy):
        if name in ALIASES and (len(args) == 1 or tuple(args[1]) == tuple(first.shape)):
            return first.same()
        if name == "aten::unsqueeze" and args[1] == 0:
            stride = (first.numel(), *first.stride())
            out = Lazy((1, *first.shape), stride, first.dtype, first.device, first.make, first.options)
            return out if first.lease is None else out.is_gradient(first.lease.sequences, first.depth)
    dense: dict[int, Tensor] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, Lazy):
            return value
        if id(value) not in dense:
            dense[id(value)] = value.whole()
        return dense[id(value)]

    out = func(*tree_map(whole, args), **tree_map(whole, kwargs))
    if isinstance(first, Lazy) and name.endswith("_") and not name.endswith("__"):  # in place
        first.become(dense[id(first)])
        return first
    return out


def _batch_statistics(x: Lazy) -> Tensor:
    """Chunk by chunk, merged as Chan, Golub and LeVeque do."""
    count, mean, squares = 0, None, None
    for a, b in spans(x.shape[0], x.steps):
        part = x.make(a, b) if x.shape[0] > 1 else x.make(0, 1)
        moments, n = normalisation.batch_statistics(part), b - a
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
    options = options_of(x, residual, residual_x)
    total = x.shape[0] * repeats

    def run(a: int, b: int, v: Tensor | None, pack: bool) -> tuple[Tensor, Tensor, Tensor]:
        part, times = part_of(x, repeats, a, b)
        return ops.unit(
            part, mean, scale, bias, chunk_of(residual, a, b), None, None, None, v, decay, None, None, times,
            charge, v_init, tau, v_threshold, v_reset, detach_reset, every, pack, surrogate, parameters, "",
        )  # fmt: skip

    shape = (total, *x.shape[1:])
    if not charge:  # the normalised sequence itself: made again wherever it is used
        # ZeRO-3 takes the layer's parameters away when it has run
        bias = None if bias is None else bias.detach().clone()
        stride = (x[0:1].numel() if not isinstance(x, Lazy) else x.stride(0), *x.stride()[1:])
        out = Lazy(shape, stride, x.dtype, x.device, lambda a, b: run(a, b, None, False)[0], options)
        out.done = lambda: done(x, residual)
        empty = torch.empty(0, dtype=x.dtype, device=x.device)
        return out, empty, torch.empty((0, 0), dtype=torch.int32, device=x.device)
    borders: list[Tensor | None] = []
    packed: list[Tensor] = []
    potentials: list[Tensor] = []
    like = None
    for a, b in spans(total, options.steps):
        borders.append(v)
        like, v_out, words = run(a, b, v, True)
        packed.append(words)
        if every:
            potentials.append(v_out)
        v = v_out[-1] if every else v_out
    done(x, residual)
    assert like is not None
    if options.keep_borders and isinstance(x, Lazy) and repeats == 1:
        x.borders[:] = [borders]
    rows, step_shape, stride, dtype = torch.cat(packed), tuple(like.shape[1:]), like.stride(), like.dtype

    def spikes(a: int, b: int) -> Tensor:
        part = packing.unpack(rows[a:b], 0, (b - a, *step_shape), stride, dtype)
        return mark_spikes(part, 1, rows[a:b])

    out = Lazy(shape, strides_of_sequence(like), dtype, x.device, spikes, options)
    return out, torch.cat(potentials) if every else v, rows


HANDLERS: dict[str, Callable[..., Any]] = {
    "scalesnn::batch_statistics": _batch_statistics,
    "scalesnn::unit": _unit,
    "scalesnn::unit_backward": gradients.unit_backward,
    "scalesnn::normalise_backward": gradients.normalise_backward,
    "scalesnn::normalise_backward_": gradients.normalise_backward_,
}
