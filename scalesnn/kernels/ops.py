"""The fused ops: torch.library custom ops with fake and autograd registrations.

Names of shapes: T time-steps, N batch, C channels, … space. x is [T, N, C, …], or [1, N, C, …] with
``repeats`` = T where all steps are the same. The equations: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels.launch import dense, empty, layout_of, like, real_dtype, run
from scalesnn.kernels.source import IDENTITY, STEPS

__all__ = [
    "CHARGES",
    "all_reduce",
    "batch_statistics",
    "differentiable_all_reduce",
    "normalise",
    "normalise_backward",
    "normalise_backward_",
    "pack",
    "unit",
    "unit_backward",
    "unpack",
]

CHARGES = {
    "identity": 0,
    "integrate": 1,
    "leaky_with_input": 2,
    "leaky": 3,
}  # enum Charge of the kernel source


def _words(size: int) -> int:
    return (size + 31) // 32


# ------------------------------------------------------------------------------------------------ statistics
@torch.library.custom_op("scalesnn::batch_statistics", mutates_args=())
def batch_statistics(x: Tensor) -> Tensor:
    """Mean and biased variance of every channel of ``x`` [T, N, C, …] over all its other dimensions.

    Returns:
        float64 [2, C]; NaN where ``x`` is empty. Not differentiable: ``unit`` carries the gradient.
    """
    x = dense(x)
    layout = layout_of(x, channels=True)
    sums = run("statistics", x, layout, steps=x.shape[0], x=x)
    assert sums is not None
    lanes = layout.size // layout.channels
    mean = sums[0] / lanes
    variance = sums[1] / (lanes * x.shape[0]) + (sums[2] / lanes - mean.square()).clamp_min(0)
    return torch.stack([mean, variance])


@batch_statistics.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[2]), dtype=torch.float64)


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
    words = (spikes.shape[0], _words(x[0].numel())) if with_bits else (0, 0)
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


def _normalise_backward(
    out: Tensor, grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, coefficients: Tensor | None
) -> None:
    real = real_dtype(x.dtype)
    layout = layout_of(x, channels=True)
    mean, scale = mean.to(real).contiguous(), scale.to(real).contiguous()
    parts = None if coefficients is None else coefficients.to(real).contiguous()
    run(
        "normalise_backward",
        x,
        layout,
        steps=x.shape[0],
        x=x,
        mean=mean,
        scale=scale,
        grad_spikes=grad,
        grad_x=out,
        mean_grad=None if parts is None else parts[0],
        slope_grad=None if parts is None else parts[1],
    )


@torch.library.custom_op("scalesnn::normalise_backward", mutates_args=())
def normalise_backward(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, coefficients: Tensor | None
) -> Tensor:
    """The second pass: scale * (grad - coefficients[0] - (x - mean) * coefficients[1]), like ``x``.

    Args:
        coefficients: [2, C]: the mean of grad_y over a channel, and that of grad_y * (x - mean) / (variance
            + eps).
            None where the statistics are constants: scale * grad.
    """
    x = dense(x)
    out = empty(x, x.shape[0])
    _normalise_backward(out, like(grad, x), x, mean, scale, coefficients)
    return out


@normalise_backward.register_fake
def _(grad, x, mean, scale, coefficients):  # type: ignore[no-untyped-def]
    return empty(dense(x), x.shape[0])


@torch.library.custom_op("scalesnn::normalise_backward_", mutates_args={"grad"})
def normalise_backward_(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, coefficients: Tensor | None
) -> None:
    """``normalise_backward`` written over ``grad``, which has the layout of ``x``."""
    _normalise_backward(grad, grad, dense(x), mean, scale, coefficients)


@normalise_backward_.register_fake
def _(grad, x, mean, scale, coefficients):  # type: ignore[no-untyped-def]
    return None


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """The sum over a process group, named as torch names it (``group.group_name``); '' leaves the tensor as
    it is."""
    if not group:
        return tensor
    reduced = torch.ops._c10d_functional.all_reduce(tensor, "sum", group)
    return torch.ops._c10d_functional.wait_tensor(reduced)


class _AllReduce(torch.autograd.Function):
    """A sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous(), ctx.group), None


def differentiable_all_reduce(tensor: Tensor, group: str) -> Tensor:
    """``all_reduce`` with autograd."""
    return _AllReduce.apply(tensor, group)


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


# -------------------------------------------------------------------------------------- spikes as bits
@torch.library.custom_op("scalesnn::pack", mutates_args=())
def pack(x: Tensor, planes: int) -> Tensor:
    """Whole numbers 0 … 2^planes - 1 as bits, in the order in which they lie in memory: int32 [planes,
    words].

    ``x`` is dense (``launch.dense``). The bits of ``unit`` are those of one plane where its steps are
    multiples of 32 elements; ``unpack`` takes the number of rows into account.
    """
    size = x.numel()
    bits = x.new_empty((planes, _words(size)), dtype=torch.int32)
    layout = layout_of(x.unsqueeze(0), channels=False)
    run("pack", x, layout._replace(size=size), steps=planes, x=x, bits=bits)
    return bits


@pack.register_fake
def _(x, planes):  # type: ignore[no-untyped-def]
    return x.new_empty((planes, _words(x.numel())), dtype=torch.int32)


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
        run("unpack", out, layout._replace(size=size), steps=max(planes, 1), bits=bits, spikes=out)
    else:
        flat = torch.as_strided(out, (rows, size // rows), (size // rows, 1))
        for row, part in zip(bits, flat, strict=True):
            run("unpack", out, layout, steps=1, bits=row, spikes=part)
    return out


@unpack.register_fake
def _(bits, planes, shape, stride, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=bits.device)
