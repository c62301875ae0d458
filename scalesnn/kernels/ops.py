"""The fused unit, normalise + charge + fire + reset: a custom op with fake and autograd registrations.

Names of shapes: T time-steps, N batch, C channels, … space. x is [T, N, C, …], or [1, N, C, …] with
``repeats`` = T where all steps are the same. The equations: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels.launch import dense, empty, layout_of, like, real_dtype, run
from scalesnn.kernels.normalisation import all_reduce, normalise_backward, normalise_backward_
from scalesnn.kernels.packing import words_of
from scalesnn.kernels.source import IDENTITY, STEPS

__all__ = ["CHARGES", "normalise", "unit", "unit_backward"]

CHARGES = {
    "identity": 0,
    "integrate": 1,
    "leaky_with_input": 2,
    "leaky": 3,
}  # enum Charge of the kernel source


# ------------------------------------------------------------------------------------------------ the unit
@torch.library.custom_op("scalesnn::unit", mutates_args=())
def unit(
    x: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_bits: Tensor | None,
    residual_x: Tensor | None,
    residual_affine: Tensor | None,
    v: Tensor | None,
    decay: Tensor | None,
    inverse_variance: Tensor | None,
    count: Tensor | None,
    repeats: int,
    charge: int,
    v_init: float,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    v_every_step: bool,
    with_bits: bool,
    surrogate: str,
    parameters: Sequence[float],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, add the residual, charge, fire and reset, in one pass over ``x``.

    Args:
        x: input current, or a convolution's output; float32, float64, bfloat16 or float16.
        mean, scale, bias: y = (x - mean) * scale + bias, each [C] in ``real_dtype``; all None: y = x.
        residual: [T, N, C, …], added to y; not with ``repeats`` > 1.
        residual_bits: the same where it is spikes: kept for the backward pass in its place.
        residual_x, residual_affine: where it is itself a normalised tensor: what was normalised, and [3, C]
            mean, scale and bias; kept in its place.
        v: potentials before the first step [N, C, …]; None: ``v_init`` everywhere.
        decay: 1 / tau as a tensor with one element, to be learned; None: ``tau``.
        inverse_variance: 1 / (variance + eps) of the batch [C], where mean and scale are statistics of ``x``
            itself: then the gradient of ``x`` runs through them too. None: they are constants.
        count: over how many values those statistics were taken, a float64 scalar (all ranks of ``group``
            together).
        charge: one of CHARGES; 'identity' returns y itself.
        v_every_step: return the potentials after every step rather than after the last.
        with_bits: pack the spikes too.
        surrogate, parameters: ``source.surrogate_key`` and the values of the names in it.
        group: the name of the process group over which the statistics were taken, or ''.

    Returns:
        spikes like ``x`` [T, N, C, …]; v in ``real_dtype``, [N, C, …] or [T, N, C, …]; and the spikes as
        bits, int32 [T, words] (empty without ``with_bits``).

    Kept for backward: ``x``, the residual in its cheapest form, and three numbers a channel.
    """
    x = dense(x)
    layout = layout_of(x, mean is not None)
    spikes, v_out, bits = _unit_outputs(x, repeats, charge, v_every_step, with_bits)
    run(
        "forward",
        x,
        layout,
        **_unit_arguments(x, mean, scale, bias, residual, None, v, decay, repeats, charge, v_init, tau),
        **_reset_arguments(v_threshold, v_reset, detach_reset),
        v_every_step=v_every_step,
        spikes=spikes,
        v=v_out if charge else None,
        bits=bits if with_bits else None,
    )
    return spikes, v_out, bits


def _unit_outputs(
    x: Tensor, repeats: int, charge: int, v_every_step: bool, with_bits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    steps = x.shape[0] * repeats
    spikes = empty(x, steps)
    v = empty(x, steps if v_every_step else None, real_dtype(x.dtype)) if charge else x.new_empty(0)
    words = (spikes.shape[0], words_of(x[0].numel())) if with_bits else (0, 0)
    return spikes, v, x.new_empty(words, dtype=torch.int32)


def _unit_arguments(
    x: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_bits: Tensor | None,
    v: Tensor | None,
    decay: Tensor | None,
    repeats: int,
    charge: int,
    v_init: float,
    tau: float,
) -> dict[str, Any]:
    real = real_dtype(x.dtype)
    if mean is not None:
        mean, scale, bias = (c.to(real).contiguous() for c in (mean, scale, bias) if c is not None)
    return {
        "x": x,
        "mean": mean,
        "scale": scale,
        "bias": bias,
        "residual": None if residual is None else like(residual, x),
        "residual_bits": residual_bits,
        "v_start": None if v is None else like(v, x, real),
        "decay": None if decay is None else decay.to(real),
        "steps": x.shape[0] * repeats,
        "x_repeated": repeats > 1,
        "charge": charge,
        "v_init": v_init,
        "tau": tau,
    }


def _reset_arguments(v_threshold: float, v_reset: float | None, detach_reset: bool) -> dict[str, Any]:
    return {
        "v_threshold": v_threshold,
        "hard_reset": v_reset is not None,
        "v_reset": v_reset or 0.0,
        "detach_reset": detach_reset,
    }


@unit.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    mean,
    scale,
    bias,
    residual,
    residual_bits,
    residual_x,
    residual_affine,
    v,
    decay,
    inverse_variance,
    count,
    repeats,
    charge,
    v_init,
    tau,
    v_threshold,
    v_reset,
    detach_reset,
    v_every_step,
    with_bits,
    surrogate,
    parameters,
    group,
):
    return _unit_outputs(dense(x), repeats, charge, v_every_step, with_bits)


@torch.library.custom_op("scalesnn::unit_backward", mutates_args=())
def unit_backward(
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_bits: Tensor | None,
    v: Tensor | None,
    decay: Tensor | None,
    repeats: int,
    charge: int,
    v_init: float,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    v_every_step: bool,
    with_grad_v_start: bool,
    surrogate: str,
    parameters: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass of ``unit``'s backward: h comes again from ``x`` and the gradients go back through time.

    Args:
        as ``unit``; grad_spikes and grad_v are those of its first two results, None where there is none.

    Returns:
        the gradient of y (of the sum over the steps, [1, N, C, …], with ``repeats`` > 1); float64 [3, C],
        sums over a
        channel of grad_y, of grad_y * (x - mean), and of the gradient of decay; the gradient of ``v`` (empty
        without ``with_grad_v_start``).
    """
    x = dense(x)
    layout = layout_of(x, mean is not None)
    steps = x.shape[0] * repeats
    real = real_dtype(x.dtype)
    grad_y = empty(x, x.shape[0])
    grad_v_start = empty(x, None, real) if with_grad_v_start else x.new_empty(0)
    borders = (steps - 1) // STEPS if charge else 0
    chunk_v = x.new_empty((borders, layout.size), dtype=real) if borders else None
    if grad_spikes is not None:
        grad_spikes = like(grad_spikes, x)
    if grad_v is not None:
        grad_v = like(grad_v, x, real)
    p = [*parameters, 0.0, 0.0, 0.0, 0.0]
    sums = run(
        "backward",
        x,
        layout,
        surrogate,
        **_unit_arguments(
            x, mean, scale, bias, residual, residual_bits, v, decay, repeats, charge, v_init, tau
        ),
        **_reset_arguments(v_threshold, v_reset, detach_reset),
        v_every_step=v_every_step,
        grad_spikes=grad_spikes,
        grad_v=grad_v,
        grad_x=grad_y,
        grad_v_start=grad_v_start if with_grad_v_start else None,
        chunk_v=chunk_v,
        p0=p[0],
        p1=p[1],
        p2=p[2],
        p3=p[3],
    )
    assert sums is not None
    return grad_y, sums, grad_v_start


@unit_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_spikes,
    grad_v,
    x,
    mean,
    scale,
    bias,
    residual,
    residual_bits,
    v,
    decay,
    repeats,
    charge,
    v_init,
    tau,
    v_threshold,
    v_reset,
    detach_reset,
    v_every_step,
    with_grad_v_start,
    surrogate,
    parameters,
):
    x = dense(x)
    channels = x.shape[2] if mean is not None else 1
    grad_v_start = empty(x, None, real_dtype(x.dtype)) if with_grad_v_start else x.new_empty(0)
    return empty(x, x.shape[0]), x.new_empty((3, channels), dtype=torch.float64), grad_v_start


def normalise(x: Tensor, affine: Tensor) -> Tensor:
    """(x - mean) * scale + bias in one pass, without autograd; ``affine`` is [3, C] mean, scale and bias."""
    n = None
    args: tuple[Any, ...] = (
        n,
        n,
        n,
        n,
        n,
        n,
        n,
        n,
        1,
        0,
        0.0,
        1.0,
        0.0,
        n,
        False,
        False,
        False,
        IDENTITY,
        [],
        "",
    )
    return unit(x, affine[0], affine[1], affine[2], *args)[0]


_UNIT_INPUTS = 24


def _unit_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mean, scale, bias, residual, bits, residual_x, affine, v, decay, inverse_variance, count, *options = (
        inputs
    )
    if bits is not None:  # the residual in its cheapest form
        residual, residual_x, affine = None, None, None
    elif residual_x is not None:
        residual, bits = None, None
    ctx.save_for_backward(
        x, mean, scale, bias, residual, bits, residual_x, affine, v, decay, inverse_variance, count
    )
    ctx.options = options
    ctx.has_residual = inputs[4] is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _unit_gradients(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, mean, scale, bias, residual, bits, residual_x, affine, v, decay, inverse_variance, count = (
        ctx.saved_tensors
    )
    repeats, charge, *rest, v_every_step, _with_bits, surrogate, parameters, group = ctx.options
    gradients: list[Tensor | None] = [None] * _UNIT_INPUTS
    needs = ctx.needs_input_grad
    if grad_spikes is None and (grad_v is None or not charge):
        return tuple(gradients)
    if residual_x is not None:
        residual = normalise(residual_x, affine)
    neuron = (charge, *rest, v_every_step)
    grad_y, sums, grad_v_start = unit_backward(
        grad_spikes,
        grad_v if charge else None,
        x,
        mean,
        scale,
        bias,
        residual,
        bits,
        v,
        decay,
        repeats,
        *neuron,
        v is not None and needs[8],
        surrogate,
        parameters,
    )
    if v is not None and needs[8]:
        gradients[8] = grad_v_start
    if decay is not None and needs[9]:
        gradients[9] = sums[2].sum().to(decay.dtype).reshape(decay.shape)
    if ctx.has_residual and needs[4]:
        gradients[4] = grad_y
    if mean is None:
        gradients[0] = grad_y
        return tuple(gradients)
    gradients[2] = sums[1].to(scale.dtype) if needs[2] else None
    gradients[3] = sums[0].to(bias.dtype) if needs[3] else None
    if not needs[0]:
        return tuple(gradients)
    coefficients = None
    if inverse_variance is not None:
        share = all_reduce(sums[:2], group) * (repeats / count)
        coefficients = torch.stack([share[0], share[1] * inverse_variance])
    if gradients[4] is None:
        normalise_backward_(grad_y, x, mean, scale, coefficients)
        gradients[0] = grad_y
    else:
        gradients[0] = normalise_backward(grad_y, x, mean, scale, coefficients)
    return tuple(gradients)


unit.register_autograd(_unit_gradients, setup_context=_unit_context)
