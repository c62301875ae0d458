"""Statistics of channels, over ranks too, and the second pass of a normalisation's backward: custom ops.

x is [T, N, C, …]. The equations: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels.launch import dense, empty, layout_of, like, real_dtype, run

__all__ = [
    "all_reduce",
    "batch_statistics",
    "differentiable_all_reduce",
    "normalise_backward",
    "normalise_backward_",
]


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
