"""The normalisation's part of a unit: statistics of channels, over ranks too; what they become; and the
second pass of the backward. Operators of torch.library (``launch.operator``).

x is [T, N, C, …]. Sums over a channel are float64, in rows [R, 3, C] that are yet to be added up, or packed
into one vector [3 C + 1] for other time-steps and other ranks. The equations: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    operator,
    prepared,
    real_dtype,
)
from scalesnn.kernels.source import SCALARS

__all__ = [
    "Sums",
    "all_reduce",
    "channel_gradients",
    "coefficients",
    "differentiable_all_reduce",
    "normalise_backward",
    "normalise_backward_",
    "packed_sums",
    "running_coefficients",
    "statistics",
]

TYPES = {dtype: number for number, dtype in enumerate(SCALARS)}  # as ENTRY of the kernel source has them


class Sums(NamedTuple):
    """Sums over the channels of x.

    Attributes:
        rows: float64 [R, 3, C]: of the means of each neuron over time, of the squares about these, and of the
            means squared; or all that packed, [3 C + 1], with the number of values.
        steps: by which the first and the third are multiplied. repeats: of x, by which the second is.
        values: of a channel, how many; -1: that is packed.
    """

    rows: Tensor
    steps: int = 1
    values: int = -1
    repeats: int = 1


@lru_cache(KEPT)
def _statistics(dtype: torch.dtype, index: int, layout: Layout, steps: int, rows: int) -> Callable[..., None]:
    numbers = {"steps": steps, "slabs": rows}
    return prepared("statistics", dtype, index, layout, ("x", "partial"), numbers)


def statistics(x: Tensor, repeats: int = 1) -> Sums:
    """The sums over the channels of ``x``, all of which is there ``repeats`` times. Not differentiable:
    ``unit`` carries the gradient."""
    return _rows(x, repeats) if direct(x) else Sums(_packed_statistics(x.detach(), repeats))


def _rows(x: Tensor, repeats: int) -> Sums:
    x = dense(x)
    layout = layout_of(x, channels=True)
    index = index_of(x)
    number = launch.slabs(layout, index)
    rows = x.new_empty((number, 3, layout.channels), dtype=torch.float64)
    if layout.size:
        _statistics(x.dtype, index, layout, x.shape[0], number)(x.data_ptr(), rows.data_ptr())
    else:
        rows.zero_()
    steps = x.shape[0] * repeats
    return Sums(rows, steps, layout.size // layout.channels * steps, repeats)


@torch.library.custom_op("scalesnn::statistics", mutates_args=())
def _packed_statistics(x: Tensor, repeats: int) -> Tensor:
    return packed_sums(_rows(x, repeats))


@_packed_statistics.register_fake
def _(x: Tensor, repeats: int) -> Tensor:
    return x.new_empty(3 * x.shape[2] + 1, dtype=torch.float64)


@lru_cache(KEPT)
def _channel_sums(
    index: int, channels: int, rows: int, steps: int, count: int, repeats: int
) -> Callable[..., None]:
    layout, numbers = (
        Layout(channels, channels, 1),
        {"steps": steps, "slabs": rows, "values": count, "repeats": repeats},
    )
    return prepared("channel_sums", torch.float64, index, layout, ("partial", "all_sums"), numbers)


def packed_sums(sums: Sums) -> Tensor:
    """The sums as one vector, float64 [3 C + 1], that may be added to those of other time-steps and ranks."""
    rows, steps, count, repeats = sums
    if count < 0:
        return rows
    number, _, channels = rows.shape
    packed = torch.empty(3 * channels + 1, dtype=torch.float64, device=rows.device)
    _channel_sums(index_of(rows), channels, number, steps, count, repeats)(rows.data_ptr(), packed.data_ptr())
    return packed


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


COEFFICIENTS = (
    *("partial", "weight", "shift", "running_mean", "running_var", "batches"),
    *("affine", "statistics"),
)


@lru_cache(KEPT)
def _coefficients(
    dtype: torch.dtype,
    index: int,
    channels: int,
    rows: int,
    numbers: tuple[int, int, int],
    eps: float,
    momentum: float,
    types: tuple[torch.dtype, torch.dtype],
) -> Callable[..., None]:
    (steps, count, repeats), (parameter, running) = numbers, types
    told = {"steps": steps, "values": count, "slabs": rows, "eps": eps, "momentum": momentum}
    told |= {"repeats": repeats, "parameter_type": TYPES[parameter], "running_type": TYPES[running]}
    return prepared("coefficients", dtype, index, Layout(channels, channels, 1), COEFFICIENTS, told)


def _check(x: Tensor, channels: int, *tensors: Tensor | None) -> None:
    """Kernels follow addresses, so what they are told of BatchNorm's tensors must be true.

    Raises:
        ValueError: one of them is on another device than ``x``, or has not one value a channel.
    """
    at = x.get_device()
    for tensor in tensors:
        if tensor is None or (
            tensor.get_device() == at and tensor.numel() == channels and tensor.is_contiguous()
        ):
            continue
        raise ValueError(
            f"BatchNorm's parameters and running statistics must have {channels} values on {x.device}, got "
            f"{tensor.numel()} on {tensor.device}"
        )


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _affine(
    dtype: torch.dtype, sums: Sums, tensors: tuple[Tensor | None, ...], eps: float, momentum: float | None
) -> tuple[Tensor, Tensor]:
    weight, bias, running_mean, running_var, batches = tensors
    rows, steps, count, repeats = sums
    number, channels = (1, (rows.numel() - 1) // 3) if count < 0 else (rows.shape[0], rows.shape[2])
    _check(rows, channels, weight, bias, running_mean, running_var)
    affine = rows.new_empty((4, channels), dtype=real_dtype(dtype))
    statistics = rows.new_empty(channels + 1)
    if batches is not None and momentum is None:  # else the kernel counts
        batches.add_(1)
    cumulative = momentum is None and batches is not None
    _coefficients(
        *(affine.dtype, index_of(rows), channels, number, (steps, count, repeats), eps),
        -1.0 if cumulative else momentum or 0.0,
        (_dtype(weight, bias), _dtype(running_mean)),
    )(
        *(rows.data_ptr(), _at(weight), _at(bias), _at(running_mean), _at(running_var), _at(batches)),
        *(affine.data_ptr(), statistics.data_ptr()),
    )
    return affine, statistics


def _dtype(tensor: Tensor | None, other: Tensor | None = None) -> torch.dtype:
    """Of the one that is there, or of both: they have the same."""
    tensor = other if tensor is None else tensor
    return torch.float32 if tensor is None else tensor.dtype


def coefficients(
    sums: Sums,
    dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    eps: float,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    """From the sums of a batch to the line that normalises it; updates the running statistics as torch's
    BatchNorm does: the running variance is of the unbiased kind.

    Args:
        sums: of all ranks. dtype: of x.
        weight, bias, running_mean, running_var, batches (``num_batches_tracked``), eps, momentum:
            BatchNorm's; None: it has none.

    Returns:
        ``affine`` and ``statistics`` of ``records.UnitInputs``.
    """
    tensors = (weight, bias, running_mean, running_var, batches)
    if not direct(sums.rows):
        given = [None if tensor is None else tensor.detach() for tensor in tensors]
        affine, statistics = _coefficients_operator(packed_sums(sums), *given, eps, momentum, dtype)
        return affine, statistics
    changed = [tensor for tensor in tensors[2:] if tensor is not None and not tensor.is_inference()]
    torch._C._increment_version(changed)  # which the kernel, that knows addresses only, does not
    return _affine(dtype, sums, tensors, eps, momentum)


@torch.library.custom_op("scalesnn::coefficients", mutates_args=("running_mean", "running_var", "batches"))
def _coefficients_operator(
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    eps: float,
    momentum: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tensors = (weight, bias, running_mean, running_var, batches)
    return _affine(dtype, Sums(sums), tensors, eps, momentum)


@_coefficients_operator.register_fake
def _(sums, weight, bias, running_mean, running_var, batches, eps, momentum, dtype):  # type: ignore[no-untyped-def]
    channels = (sums.shape[0] - 1) // 3
    return sums.new_empty((4, channels), dtype=real_dtype(dtype)), sums.new_empty(channels + 1)


@operator("running_coefficients")
def running_coefficients(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``affine`` of a BatchNorm in evaluation, for x of ``dtype``."""
    channels = running_mean.shape[0]
    _check(running_mean, channels, running_var, weight, bias)
    affine = torch.empty((4, channels), dtype=real_dtype(dtype), device=running_mean.device)
    types = (_dtype(weight, bias), running_mean.dtype)
    _coefficients(affine.dtype, index_of(affine), channels, 0, (1, 0, 1), eps, 0.0, types)(
        *(0, _at(weight), _at(bias), running_mean.data_ptr(), running_var.data_ptr(), 0, affine.data_ptr(), 0)
    )
    return affine


@running_coefficients.operator.register_fake
def _(running_mean, running_var, weight, bias, eps, dtype):  # type: ignore[no-untyped-def]
    return running_mean.new_empty((4, running_mean.shape[0]), dtype=real_dtype(dtype))


GRADIENTS = ("partial", "all_sums", "affine", "statistics", "coefficients", "grad_weight", "grad_shift")


@lru_cache(KEPT)
def _gradients(
    dtype: torch.dtype, index: int, channels: int, rows: int, steps: int, parameter: torch.dtype
) -> Callable[..., None]:
    numbers = {"steps": steps, "slabs": rows, "parameter_type": TYPES[parameter]}
    return prepared("channel_gradients", dtype, index, Layout(channels, channels, 1), GRADIENTS, numbers)


@operator("channel_gradients")
def channel_gradients(
    rows: Tensor,
    affine: Tensor,
    statistics: Tensor | None,
    repeats: int,
    group: str,
    parameter: torch.dtype,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """From ``unit_backward``'s sums to what ``normalise_backward`` needs and to the gradients of BatchNorm's
    parameters.

    Args:
        rows: float64 [R, 3, C], of which the first two are added up over ``group`` for the coefficients.
        affine, statistics, repeats, group: of ``records.UnitInputs``.
        parameter: the dtype of weight and bias.
        with_weight, with_bias: which gradients are made; the others are empty.

    Returns:
        coefficients [2, C] in the dtype of ``affine``: the mean of grad_y over a channel, and that of grad_y
        * (x - mean) / (variance + eps); empty where the statistics are constants. The gradients of weight
        and bias.
    """
    number, _, channels = rows.shape
    found, weight, bias = _gradients_empty(affine, channels, statistics, parameter, with_weight, with_bias)
    reduced = None
    if group and statistics is not None:
        reduced = all_reduce(packed_sums(Sums(rows, 1, 0)), group)
    if found.numel() or with_weight or with_bias:
        _gradients(affine.dtype, index_of(affine), channels, number, repeats, parameter)(
            *(rows.data_ptr(), _at(reduced), affine.data_ptr(), _at(statistics)),
            found.data_ptr() if statistics is not None else 0,
            weight.data_ptr() if with_weight else 0,
            bias.data_ptr() if with_bias else 0,
        )
    return found, weight, bias


def _gradients_empty(
    affine: Tensor,
    channels: int,
    statistics: Tensor | None,
    parameter: torch.dtype,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        affine.new_empty((2, channels if statistics is not None else 0)),
        affine.new_empty(channels if with_weight else 0, dtype=parameter),
        affine.new_empty(channels if with_bias else 0, dtype=parameter),
    )


@channel_gradients.operator.register_fake
def _(rows, affine, statistics, repeats, group, parameter, with_weight, with_bias):  # type: ignore[no-untyped-def]
    return _gradients_empty(affine, affine.shape[1], statistics, parameter, with_weight, with_bias)


NORMALISE_BACKWARD = ("x", "mean", "scale", "grad_spikes", "grad_x", "mean_grad", "slope_grad")


@lru_cache(KEPT)
def _normalise_launch(dtype: torch.dtype, index: int, layout: Layout, steps: int) -> Callable[..., None]:
    return prepared("normalise_backward", dtype, index, layout, NORMALISE_BACKWARD, {"steps": steps})


def _normalise_backward(
    out: Tensor, grad: Tensor, x: Tensor, affine: Tensor, coefficients: Tensor | None
) -> None:
    layout = layout_of(x, channels=True)
    if not layout.size:
        return
    row = layout.channels * affine.element_size()
    mean, parts = affine.data_ptr(), _at(coefficients)
    _normalise_launch(x.dtype, index_of(x), layout, x.shape[0])(
        *(x.data_ptr(), mean, mean + row, grad.data_ptr(), out.data_ptr()),
        *(parts, parts and parts + row),
    )


@operator("normalise_backward")
def normalise_backward(grad: Tensor, x: Tensor, affine: Tensor, coefficients: Tensor | None) -> Tensor:
    """The second pass: scale * (grad - coefficients[0] - (x - mean) * coefficients[1]), like ``x``.

    Args:
        affine: of ``records.UnitInputs``.
        coefficients: of ``channel_gradients``; None where the statistics are constants: scale * grad.
    """
    x = dense(x)
    out = empty(x, x.shape[0])
    _normalise_backward(out, like(grad, x), x, affine, coefficients)
    return out


@normalise_backward.operator.register_fake
def _(grad, x, affine, coefficients):  # type: ignore[no-untyped-def]
    return empty(dense(x), x.shape[0])


@operator("normalise_backward_", mutates=("grad",))
def normalise_backward_(grad: Tensor, x: Tensor, affine: Tensor, coefficients: Tensor | None) -> None:
    """``normalise_backward`` written over ``grad``, which has the layout of ``x``."""
    _normalise_backward(grad, grad, dense(x), affine, coefficients)


@normalise_backward_.operator.register_fake
def _(grad, x, affine, coefficients):  # type: ignore[no-untyped-def]
    return None
