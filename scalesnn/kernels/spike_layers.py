"""Layers whose input is spikes, as ops that keep bits for the backward pass: convolution and max-pool.

torch.library custom ops with fake and autograd registrations, as in ``ops``. On the CPU a convolution is
looked up in tables of sums rather than multiplied where it can be: ``spike_conv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels import spike_conv
from scalesnn.kernels.packing import unpack

__all__ = ["convolution_backward", "max_pool2d", "spike_conv2d", "spike_conv2d_weight", "spike_max_pool2d"]

INT16_MAX = 32767


# ------------------------------------------------------------------------------------------------ convolution
@torch.library.custom_op("scalesnn::spike_conv2d", mutates_args=())
def spike_conv2d(
    x: Tensor,
    bits: Tensor,
    planes: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``torch.nn.functional.conv2d`` of spikes: for the weight's gradient ``bits`` are kept in the place of
    ``x``.

    Args:
        x: [N, C, H, W], dense, equal to ``unpack(bits, planes, …)``.
        others: as torch's.
    """
    if spike_conv.suits(x, planes, weight, groups):
        return spike_conv.convolve(x.shape, bits, weight, bias, stride, padding, dilation)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


@spike_conv2d.register_fake
def _(x, bits, planes, weight, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


@torch.library.custom_op("scalesnn::spike_conv2d_weight", mutates_args=())
def spike_conv2d_weight(
    grad: Tensor,
    bits: Tensor,
    shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of ``spike_conv2d``'s weight where ``spike_conv`` suits: like ``weight``.

    Args:
        grad: of the output, [N, outputs, H, W].
        shape: of ``x``.
    """
    return spike_conv.weight_gradient(grad, shape, bits, weight, stride, padding, dilation)


@spike_conv2d_weight.register_fake
def _(grad, bits, shape, weight, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight)


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bits, planes, weight, bias, *ctx.geometry = inputs
    ctx.planes, ctx.dtype = planes, x.dtype
    ctx.shape, ctx.strides = tuple(x.shape), x.stride()
    ctx.bias_sizes = None if bias is None else tuple(bias.shape)
    ctx.looks_up = spike_conv.suits(x, planes, weight, ctx.geometry[-1])
    ctx.save_for_backward(bits, weight)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    bits: Tensor | None,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    mask: Sequence[bool],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """torch's ``convolution_backward``: the gradients of input, weight and bias that ``mask`` asks for.

    Args:
        x: the input [N, C, H, W]; where ``bits`` are given, or the weight's gradient is not asked for, only
            its form counts.
        bits: of ``x``, where ``spike_conv.suits``: the weight's gradient is looked up.
    """
    of_x = of_weight = of_bias = None
    need_x, need_weight, need_bias = mask
    if need_weight and bits is not None:
        of_weight = spike_conv2d_weight(grad, bits, x.shape, weight, stride, padding, dilation)
        need_weight = False
    if need_x or need_weight or need_bias:
        geometry = (stride, padding, dilation, False, [0, 0], groups)
        of_x, product, of_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, bias_sizes, *geometry, [need_x, need_weight, need_bias]
        )
        of_weight = product if need_weight else of_weight
    return of_x, of_weight, of_bias


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bits, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[3], ctx.bias_sizes is not None and needs[4]]
    if ctx.looks_up:
        x = torch.empty_strided(ctx.shape, ctx.strides, dtype=ctx.dtype, device=grad.device)
    else:
        x = unpack(bits, ctx.planes, ctx.shape, ctx.strides, ctx.dtype)
    packed = bits if ctx.looks_up else None
    of_x, of_weight, of_bias = convolution_backward(
        grad, x, packed, weight, ctx.bias_sizes, mask, *ctx.geometry
    )
    return of_x, None, None, of_weight, of_bias, None, None, None, None


spike_conv2d.register_autograd(_conv_gradients, setup_context=_conv_context)


# ------------------------------------------------------------------------------------------------ max-pool
@torch.library.custom_op("scalesnn::max_pool2d", mutates_args=())
def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.nn.functional.max_pool2d`` of [N, C, H, W]; its second result, where the maxima stand, is
    int16 (int32
    for planes of more than 32768 values) rather than int64. For backward only that one is kept."""
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)
    return y, indices.to(_index_dtype(x))


def _index_dtype(x: Tensor) -> torch.dtype:
    return torch.int16 if x.shape[-1] * x.shape[-2] <= INT16_MAX + 1 else torch.int32


@max_pool2d.register_fake
def _(x, kernel_size, stride, padding, dilation, ceil_mode):  # type: ignore[no-untyped-def]
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)
    return y, indices.to(_index_dtype(x))


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.geometry = inputs
    ctx.shape, ctx.strides, ctx.dtype = tuple(x.shape), x.stride(), x.dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    # torch wants the input for its shape and memory format only
    x = torch.empty_strided(ctx.shape, ctx.strides, dtype=ctx.dtype, device=grad.device)
    grad_x = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *ctx.geometry, indices.long())
    return grad_x, None, None, None, None, None


max_pool2d.register_autograd(_pool_gradients, setup_context=_pool_context)


@torch.library.custom_op("scalesnn::spike_max_pool2d", mutates_args=())
def spike_max_pool2d(
    x: Tensor,
    bits: Tensor,
    planes: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """``torch.nn.functional.max_pool2d`` of spikes: for backward only their ``bits`` are kept, from which the
    places of the maxima are found again.

    Args:
        x: [N, C, H, W], dense, equal to ``unpack(bits, planes, …)``.
        others: as torch's.
    """
    return torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)[0]


@spike_max_pool2d.register_fake
def _(x, bits, planes, kernel_size, stride, padding, dilation, ceil_mode):  # type: ignore[no-untyped-def]
    return torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)[0]


def _spike_pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bits, ctx.planes, *ctx.geometry = inputs
    ctx.shape, ctx.strides = tuple(x.shape), x.stride()
    ctx.save_for_backward(bits)


def _spike_pool_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (bits,) = ctx.saved_tensors
    grad_x = torch.empty_strided(ctx.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
    rows = bits.split(1) if ctx.planes == 0 else [bits]
    images = ctx.shape[0] // len(rows)
    shape = (images, *ctx.shape[1:])
    for row, of_y, of_x in zip(rows, grad.split(images), grad_x.split(images), strict=True):
        # a row at a time: all of x and of the int64 places would be the largest tensors of the step
        x = unpack(row, ctx.planes, shape, ctx.strides, grad.dtype)
        _, places = torch.ops.aten.max_pool2d_with_indices(x, *ctx.geometry)
        backward = torch.ops.aten.max_pool2d_with_indices_backward.grad_input
        backward(of_y, x, *ctx.geometry, places, grad_input=of_x)
        del x, places  # before the next are made
    return grad_x, None, None, None, None, None, None, None


spike_max_pool2d.register_autograd(_spike_pool_gradients, setup_context=_spike_pool_context)
