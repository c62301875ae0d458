"""BatchNorm with statistics over all ranks, on any backend (torch's SyncBatchNorm refuses CPU tensors).

scalesnn's own BatchNorm2d knows how to do it (``layer.convert_sync_batchnorm``); this module does it for
torch's layers, for networks that keep them inside containers. One reduction of three numbers per channel in
forward, one of two in backward, both in float64, so that two ranks with half a batch each compute what one
rank computes with the whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scalesnn import layer

__all__ = ["convert_sync_batch_norm", "sync_batch_norm"]


class _Normalise(torch.autograd.Function):
    """(x - mean) · weight / std + bias with mean and std over all ranks; returns y, mean, variance, count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        dims = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x.to(accumulator(x.dtype)), dims, correction=0)
        var, mean = var.double(), mean.double()
        n = torch.full((1,), x.numel() // channels, dtype=torch.float64, device=x.device)
        sums = torch.cat([mean * n, (var + mean.square()) * n, n])
        dist.all_reduce(sums, group=group)
        n = sums[-1]
        mean = sums[:channels] / n
        var = (sums[channels:-1] / n - mean.square()).clamp_min(0)
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, scale, n)
        ctx.group = group
        kind = accumulator(x.dtype)
        factor = (scale * weight.double()).to(kind)
        y = torch.addcmul(along(bias.to(kind), x), x.to(kind) - along(mean.to(kind), x), along(factor, x)).to(
            x.dtype
        )
        ctx.mark_non_differentiable(mean, var, n)
        return y, mean, var, n

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, scale, n = ctx.saved_tensors
        kind = accumulator(x.dtype)
        dims = [0, *range(2, x.ndim)]
        dy = dy.to(kind)
        normal = (x.to(kind) - along(mean.to(kind), x)) * along(scale.to(kind), x)
        dbias = dy.sum(dims)
        dweight = (dy * normal).sum(dims)
        sums = torch.stack([dbias, dweight]).double()
        dist.all_reduce(sums, group=ctx.group)
        of_dy, of_product = (sums / n).to(kind)
        factor = (scale * weight.double()).to(kind)
        dx = (dy - along(of_dy, x) - normal * along(of_product, x)) * along(factor, x)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def along(values: Tensor, x: Tensor) -> Tensor:
    """[C] shaped to go along the channels of ``x``."""
    return values.view(1, -1, *([1] * (x.ndim - 2)))


def sync_batch_norm(bn: _BatchNorm, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``bn(x)`` in training mode with statistics over all ranks of ``group``; updates the running statistics.

    Args:
        x: [N, C, …]; N may differ between ranks.
    """
    weight = bn.weight if bn.weight is not None else x.new_ones(x.shape[1])
    bias = bn.bias if bn.bias is not None else x.new_zeros(x.shape[1])
    y, mean, var, n = _Normalise.apply(x, weight, bias, bn.eps, group)
    if bn.track_running_stats and bn.running_mean is not None and bn.running_var is not None:
        with torch.no_grad():
            assert bn.num_batches_tracked is not None
            bn.num_batches_tracked.add_(1)
            momentum = bn.momentum if bn.momentum is not None else 1.0 / float(bn.num_batches_tracked)
            unbiased = var * n / (n - 1).clamp_min(1)
            bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), momentum)
            bn.running_var.lerp_(unbiased.to(bn.running_var.dtype), momentum)
    return y


class _SyncForward(_BatchNorm):
    """A BatchNorm layer of torch whose training statistics are those of all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, …] to the same shape."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        return sync_batch_norm(self, input)


class SyncBatchNorm1d(_SyncForward, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over all ranks."""


class SyncBatchNorm2d(_SyncForward, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` over all ranks."""


class SyncBatchNorm3d(_SyncForward, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` over all ranks."""


SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """Make every BatchNorm layer of ``model`` compute its training statistics over all ranks.

    The layers stay the same objects, with the same parameters and names. Returns ``model``.
    """
    for module in model.modules():
        if type(module) in SYNCHRONISED:
            module.__class__ = SYNCHRONISED[type(module)]
    return layer.convert_sync_batchnorm(model)
