"""The fused unit, normalise + charge + fire + reset: an operator with fake and autograd registrations, which
is called without torch's dispatcher where that is not needed (``launch.direct``).

Names of shapes: T time-steps, N batch, C channels, … space. The equations: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalesnn.kernels import launch
from scalesnn.kernels.launch import (
    KEPT,
    Layout,
    dense,
    direct,
    empty,
    index_of,
    layout_of,
    like,
    prepared,
    real_dtype,
)
from scalesnn.kernels.normalisation import channel_gradients, normalise_backward, normalise_backward_
from scalesnn.kernels.packing import words_of
from scalesnn.kernels.records import CHARGES, TENSORS, NeuronParameters, UnitInputs, schema_of
from scalesnn.kernels.source import STEPS

__all__ = ["normalise", "unit", "unit_backward"]

INPUT = ("x", "mean", "scale", "bias", "residual", "residual_bits", "v_start", "decay")
FORWARD = (*INPUT, "spikes", "v", "bits")
BACKWARD = (*INPUT, "grad_spikes", "grad_v", "grad_x", "grad_v_start", "partial", "chunk_v")


def unit(u: UnitInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, add the residual, charge, fire and reset, in one pass over ``x``.

    Returns:
        spikes like ``x`` [T, N, C, …]; v in ``real_dtype``, [N, C, …] or [T, N, C, …]; and the spikes as
        bits, int32 [T, words] (empty without ``with_bits``).

    Kept for backward: ``x``, the residual in its cheapest form, and a few numbers a channel.
    """
    if not direct(u.x):
        spikes, v, bits = _operator(*u.flat())
        return spikes, v, bits
    if not torch.is_grad_enabled():
        return _forward(u)
    out: tuple[Tensor, Tensor, Tensor] = _Unit.apply(u, u.x, u.weight, u.bias, u.residual, u.v, u.decay)
    return out


def _outputs(u: UnitInputs, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    steps = x.shape[0] * u.repeats
    spikes = empty(x, steps)
    if not u.neuron.fires:
        v = x.new_empty(0)
    else:
        v = empty(x, steps if u.v_every_step else None, real_dtype(x.dtype))
    words = (steps, words_of(x.numel() // max(x.shape[0], 1))) if u.with_bits else (0, 0)
    return spikes, v, x.new_empty(words, dtype=torch.int32)


@lru_cache(KEPT)
def _launch(
    name: str,
    dtype: torch.dtype,
    index: int,
    layout: Layout,
    rows: int,
    steps: int,
    repeats: int,
    v_init: float,
    v_every_step: bool,
    neuron: NeuronParameters,
) -> Callable[..., None]:
    numbers = {
        "steps": steps,
        "slabs": rows,
        "x_repeated": repeats > 1,
        "charge": CHARGES[neuron.charge],
        "hard_reset": neuron.v_reset is not None,
        "detach_reset": neuron.detach_reset,
        "v_every_step": v_every_step,
        "v_init": v_init,
        "tau": neuron.tau,
        "v_threshold": neuron.v_threshold,
        "v_reset": neuron.v_reset or 0.0,
        **{f"p{i}": value for i, value in enumerate(neuron.surrogate_parameters)},
    }
    addresses = FORWARD if name == "forward" else BACKWARD
    return prepared(name, dtype, index, layout, addresses, numbers, neuron.surrogate)


def _run(name: str, u: UnitInputs, x: Tensor, layout: Layout, rows: int, outputs: tuple[int, ...]) -> None:
    """Run 'forward' or 'backward' on the dense ``x``."""
    index, real = index_of(x), real_dtype(x.dtype)
    mean = row = 0
    if u.affine is not None:
        assert u.affine.dtype == real, f"affine must be {real}, got {u.affine.dtype}"
        mean, row = u.affine.data_ptr(), layout.channels * u.affine.element_size()
    as_bits = name == "backward" and u.residual_bits is not None
    bits = u.residual_bits if as_bits else None
    residual = None if u.residual is None or as_bits else like(u.residual, x)
    v = None if u.v is None else like(u.v, x, real)
    decay = None if u.decay is None else u.decay.to(real)
    _launch(
        *(name, x.dtype, index, layout, rows, x.shape[0] * u.repeats, u.repeats, u.v_init, u.v_every_step),
        u.neuron,
    )(
        *(x.data_ptr(), mean, mean + row, mean + 2 * row),
        *(0 if t is None else t.data_ptr() for t in (residual, bits, v, decay)),
        *outputs,
    )


def _forward(u: UnitInputs) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(u.x)
    layout = layout_of(x, u.affine is not None)
    spikes, v, bits = _outputs(u, x)
    if layout.size:
        fires, packs = u.neuron.fires, u.with_bits
        at = (spikes.data_ptr(), v.data_ptr() if fires else 0, bits.data_ptr() if packs else 0)
        _run("forward", u, x, layout, 1, at)
    return spikes, v, bits


@torch.library.custom_op(
    "scalesnn::unit", mutates_args=(), schema=f"({schema_of()}) -> (Tensor, Tensor, Tensor)"
)
def _operator(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(UnitInputs.of(values))


@_operator.register_fake
def _(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    u = UnitInputs.of(values)
    return _outputs(u, dense(u.x))


def unit_backward(
    grad_spikes: Tensor | None, grad_v: Tensor | None, u: UnitInputs, with_grad_v_start: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass of ``unit``'s backward: h comes again from ``x`` and the gradients go back through time.

    Args:
        grad_spikes, grad_v: of ``unit``'s first two results; None where there is none.
        u: as ``unit`` had it; ``residual`` or ``residual_bits``.

    Returns:
        the gradient of y (of the sum over the steps, [1, N, C, …], with ``repeats`` > 1); float64 [R, 3, C],
        in R rows the sums over a channel of grad_y, of grad_y * (x - mean), and of the gradient of decay; the
        gradient of ``v`` (empty without ``with_grad_v_start``).
    """
    if direct(u.x):
        return _backward(grad_spikes, grad_v, with_grad_v_start, u)
    grad_y, rows, grad_v_start = _backward_operator(grad_spikes, grad_v, with_grad_v_start, *u.flat())
    return grad_y, rows, grad_v_start


def _backward_outputs(
    u: UnitInputs, x: Tensor, with_grad_v_start: bool, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_v_start = empty(x, None, real_dtype(x.dtype)) if with_grad_v_start else x.new_empty(0)
    channels = x.shape[2] if u.affine is not None else 1
    sums = x.new_empty((rows, 3, channels), dtype=torch.float64)
    return empty(x, x.shape[0]), sums, grad_v_start


def _backward(
    grad_spikes: Tensor | None, grad_v: Tensor | None, with_grad_v_start: bool, u: UnitInputs
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(u.x)
    layout = layout_of(x, u.affine is not None)
    rows = launch.slabs(layout, index_of(x))
    grad_y, sums, grad_v_start = _backward_outputs(u, x, with_grad_v_start, rows)
    if not layout.size:
        return grad_y, sums.zero_(), grad_v_start
    real = real_dtype(x.dtype)
    borders = (x.shape[0] * u.repeats - 1) // STEPS if u.neuron.fires else 0
    chunk_v = x.new_empty((borders, layout.size), dtype=real) if borders else None
    of_spikes = None if grad_spikes is None else like(grad_spikes, x)
    of_v = None if grad_v is None else like(grad_v, x, real)
    at = (
        *(0 if t is None else t.data_ptr() for t in (of_spikes, of_v)),
        *(grad_y.data_ptr(), grad_v_start.data_ptr() if with_grad_v_start else 0, sums.data_ptr()),
        0 if chunk_v is None else chunk_v.data_ptr(),
    )
    _run("backward", u, x, layout, rows, at)
    return grad_y, sums, grad_v_start


@torch.library.custom_op(
    "scalesnn::unit_backward",
    mutates_args=(),
    schema="(Tensor? grad_spikes, Tensor? grad_v, bool with_grad_v_start, "
    f"{schema_of()}) -> (Tensor, Tensor, Tensor)",
)
def _backward_operator(
    grad_spikes: Tensor | None, grad_v: Tensor | None, with_grad_v_start: bool, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    u = UnitInputs.of(values)
    grad_y, rows, grad_v_start = _backward(grad_spikes, grad_v, with_grad_v_start, u)
    return grad_y, rows.sum(0, keepdim=True), grad_v_start  # as many rows as the fake one has


@_backward_operator.register_fake
def _(grad_spikes, grad_v, with_grad_v_start, *values):  # type: ignore[no-untyped-def]
    u = UnitInputs.of(values)
    return _backward_outputs(u, dense(u.x), with_grad_v_start, 1)


def normalise(x: Tensor, affine: Tensor) -> Tensor:
    """(x - mean) * scale + bias in one pass, without autograd; ``affine`` is [3 or 4, C], mean, scale and
    bias."""
    u = UnitInputs(x, affine)
    return _forward(u)[0] if direct(x) else _operator(*u.flat())[0]


LEARNED = ("x", "weight", "bias", "residual", "v", "decay")  # which have gradients
PLACES = tuple(UnitInputs._fields.index(name) for name in LEARNED)


def _keep(ctx: Any, u: UnitInputs, bits: Tensor) -> None:
    """Save what backward needs: the residual in its cheapest form, no values of BatchNorm's parameters, which
    are in ``affine``."""
    residual, residual_x, residual_affine = u.residual, u.residual_x, u.residual_affine
    if u.residual_bits is not None:
        residual = residual_x = residual_affine = None
    elif residual_x is not None:
        residual = None
    ctx.save_for_backward(
        *(u.x, u.affine, u.statistics, residual, u.residual_bits, residual_x, residual_affine, u.v, u.decay)
    )
    ctx.options = u[TENSORS:]
    parameter = u.bias if u.weight is None else u.weight
    ctx.parameter = None if parameter is None else parameter.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(bits)


def _gradients(
    ctx: Any, needs: Sequence[bool], of_spikes: Tensor | None, of_v: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of LEARNED, those that ``needs`` asks for."""
    x, affine, statistics, residual, bits, residual_x, residual_affine, v, decay = ctx.saved_tensors
    fires = ctx.options[-1].fires
    if of_spikes is None and (of_v is None or not fires):
        return (None,) * len(LEARNED)
    if residual_x is not None:
        residual = normalise(residual_x, residual_affine)
    u = UnitInputs(*(x, affine, statistics, None, None, residual, bits, None, None, v, decay), *ctx.options)
    need_x, need_weight, need_bias, need_residual, need_v, need_decay = needs
    grad_y, rows, of_start = unit_backward(of_spikes, of_v if fires else None, u, need_v)
    of_x, of_weight, of_bias = grad_y, None, None
    if affine is not None:
        coefficients, of_weight, of_bias = channel_gradients(
            *(rows, affine, statistics, u.repeats, u.group if need_x else ""),
            *(ctx.parameter or affine.dtype, need_weight, need_bias),
        )
        parts = None if statistics is None else coefficients
        if need_x and need_residual:
            of_x = normalise_backward(grad_y, x, affine, parts)
        elif need_x:
            normalise_backward_(grad_y, x, affine, parts)
    return (
        of_x if need_x else None,
        of_weight if need_weight else None,
        of_bias if need_bias else None,
        grad_y if need_residual else None,
        of_start if need_v else None,
        rows[:, 2].sum().to(decay.dtype).reshape(decay.shape) if need_decay else None,
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _keep(ctx, UnitInputs.of(inputs), output[2])


def _operator_gradients(ctx: Any, of_spikes: Tensor | None, of_v: Tensor | None, _: Any) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[place] for place in PLACES]
    found = dict(zip(PLACES, _gradients(ctx, needs, of_spikes, of_v), strict=True))
    return tuple(found.get(place) for place in range(len(ctx.needs_input_grad)))


_operator.register_autograd(_operator_gradients, setup_context=_context)


class _Unit(torch.autograd.Function):
    """``unit`` with autograd, without torch's dispatcher; its arguments are ``u`` and the LEARNED of it."""

    @staticmethod
    def forward(ctx: Any, u: UnitInputs, *learned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        out = _forward(u)
        _keep(ctx, u, out[2])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (_once if torch.is_grad_enabled() else _unit_gradients)(ctx, *grads)


def _unit_gradients(ctx: Any, of_spikes: Tensor | None, of_v: Tensor | None, _: Any) -> tuple[Any, ...]:
    return (None, *_gradients(ctx, ctx.needs_input_grad[1:], of_spikes, of_v))


_once = once_differentiable(_unit_gradients)  # where the graph of backward is recorded
