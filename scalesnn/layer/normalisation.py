"""Normalisations that know step modes, and the unit norm → (+ residual) → neuron."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from scalesnn.base import UserError
from scalesnn.functional import seq_to_ann_forward
from scalesnn.kernels import normalisation
from scalesnn.kernels.deferred import Deferred, settle
from scalesnn.kernels.normalisation import Sums
from scalesnn.kernels.unit import Normalisation, normalise, usable
from scalesnn.layer.step import StepLayer, check_images, is_repeated, is_watched, once_of
from scalesnn.neuron import BaseNode

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "convert_sync_batchnorm",
]


class _NormUnit(StepLayer):
    """A normalisation layer that can run the unit norm → (+ residual) → neuron in one call.

    Models call ``bn(conv(x), neuron=sn, residual=identity)`` rather than ``sn(bn(conv(x)) + identity)``, so
    that the three can be fused.
    """

    def forward(self, x: Tensor, neuron: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalise; add ``residual``; fire.

        Args:
            x: [N, C, H, W] or [T, N, C, H, W], as ``step_mode`` says.
            neuron: takes the sum; its spikes are returned. Without it the sum is returned.
            residual: added to the normalised input; its shape.
        """
        x = settle(x, norm=True)
        if self._fuses(x, neuron, residual):
            norm = self._statistics(x)
            norm.residual = residual
            return normalise(x, norm) if neuron is None else neuron(x, norm=norm)
        y = self._normalise(x)
        if residual is not None:
            y = y + residual
        return y if neuron is None else neuron(y)

    def _fuses(self, x: Tensor, neuron: nn.Module | None, residual: Tensor | None) -> bool:
        """Whether the unit can be one fused op."""
        return False

    def _statistics(self, x: Tensor) -> Normalisation:
        """What the fused op does to ``x``; updates running statistics."""
        raise NotImplementedError

    def _normalise(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _BatchNorm(_NormUnit, BatchNorm):
    """torch's BatchNorm, in step mode ``'m'`` with statistics over time, batch and space.

    torch's arguments, and ``step_mode``. ``forward(x, neuron, residual)``: the whole unit norm → (+
    residual) → neuron.

    Attributes:
        backend: 'auto' runs fused where possible, 'torch' is the reference.
        group: name of the process group over which statistics are taken, '' for none; set by
            ``convert_sync_batchnorm``.
    """

    backend: str = "auto"
    group: str = ""

    def _fuses(self, x: Tensor, neuron: nn.Module | None, residual: Tensor | None) -> bool:
        if (
            self.step_mode != "m"
            or x.dim() - 3 not in self.spaces
            or x.shape[2] != self.num_features
            or self.backend == "torch"
        ):
            return False
        if neuron is not None:
            if not isinstance(neuron, BaseNode) or not neuron.fuses(x) or is_watched(neuron):
                return False
        elif not usable(x, "auto") or (residual is None and is_repeated(x)):
            return False
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            return False
        return not self._uses_batch() or bool(self.group) or x.numel() > x.shape[2]

    def _uses_batch(self) -> bool:
        """Whether the statistics are the batch's, not the running ones."""
        return self.training or self.running_mean is None or self.running_var is None

    def _statistics(self, x: Tensor) -> Normalisation:
        weight, bias = self.weight, self.bias
        if not self._uses_batch():
            assert self.running_mean is not None
            assert self.running_var is not None
            running = (self.running_mean, self.running_var)
            affine = normalisation.running_coefficients(*running, weight, bias, self.eps, x.dtype)
            return Normalisation(affine, None, weight, bias)
        if isinstance(x, Deferred):
            sums = x.statistics()
        elif is_repeated(x):
            sums = normalisation.statistics(once_of(x).unsqueeze(0), x.shape[0])
        else:
            sums = normalisation.statistics(x)
        if self.group:
            sums = Sums(normalisation.all_reduce(normalisation.packed_sums(sums), self.group))
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        affine, statistics = normalisation.coefficients(
            *(sums, x.dtype, weight, bias),
            *(buffers if self.training else (None, None, None)),
            *(self.eps, self.momentum),
        )
        return Normalisation(affine, statistics, weight, bias, self.group)

    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """As torch: the running variance is of the unbiased kind."""
        if self.running_mean is None or self.running_var is None:
            return
        momentum: Tensor | float = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / self.num_batches_tracked.double()
        unbiased = variance * (count / (count - 1))
        self.running_mean.copy_(self.running_mean * (1 - momentum) + mean * momentum)
        self.running_var.copy_(self.running_var * (1 - momentum) + unbiased * momentum)

    def _normalise(self, x: Tensor) -> Tensor:
        check_images(self, x)
        normalise = super(_NormUnit, self).forward
        if self.group and self._uses_batch():
            return self._normalise_over_group(x)
        if self.step_mode == "s":
            return normalise(x)
        n = x[0].numel() // x.shape[2]
        if not is_repeated(x) or n == 1:
            return seq_to_ann_forward(x, normalise)
        # One image repeated T times: the same mean and variance, but the running variance is the unbiased
        # one, whose n / (n - 1) has T times as many values.
        before = self.running_var.clone() if self.training and self.running_var is not None else None
        y = normalise(x[0])
        if before is not None and self.running_var is not None and self.num_batches_tracked is not None:
            momentum = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
            scale = (n - 1) / n * (n * x.shape[0]) / (n * x.shape[0] - 1)
            # .data: autograd keeps running_var with the graph, unread, and would complain of the change
            self.running_var.data.mul_(scale).add_(before * ((1 - momentum) * (1 - scale)))
        return y.expand(x.shape[0], *y.shape)

    def _normalise_over_group(self, x: Tensor) -> Tensor:
        """Plain torch with statistics over the process group, on any backend; autograd goes through the
        sums."""
        channel = 2 if self.step_mode == "m" else 1
        dims = [d for d in range(x.dim()) if d != channel]

        def along(values: Tensor) -> Tensor:
            return values.view([-1, *[1] * (x.dim() - channel - 1)])

        wide = x.double() if x.dtype == torch.float64 else x.float()
        count = torch.full((), x.numel() // x.shape[channel], dtype=torch.float64, device=x.device)
        count = normalisation.all_reduce(count, self.group).to(wide.dtype)
        mean = normalisation.differentiable_all_reduce(wide.sum(dims), self.group) / count
        centred = wide - along(mean)
        variance = normalisation.differentiable_all_reduce(centred.square().sum(dims), self.group) / count
        if self.training:
            self._update_running_statistics(mean.detach(), variance.detach(), count)
        y = centred * along((variance + self.eps).rsqrt())
        if self.weight is not None and self.bias is not None:
            y = y * along(self.weight) + along(self.bias)
        return y.to(x.dtype)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` for [N, C], [N, C, L], [T, N, C] or [T, N, C, L]; else as BatchNorm2d."""

    spaces = (0, 1)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, in step mode ``'m'`` with statistics over time, batch and space.

    torch's arguments, and ``step_mode``. ``forward(x, neuron, residual)``: the whole unit norm → (+
    residual) → neuron.

    Attributes:
        backend: 'auto' runs fused where possible, 'torch' is the reference.
        group: name of the process group over which statistics are taken, '' for none; set by
            ``convert_sync_batchnorm``.
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` for [N, C, D, H, W] or [T, N, C, D, H, W]; else as BatchNorm2d."""

    spaces = (3,)


def convert_sync_batchnorm(
    model: nn.Module, process_group: torch.distributed.ProcessGroup | None = None
) -> nn.Module:
    """Let every BatchNorm of the model take its statistics over all ranks of a process group, NCCL or gloo.

    Args:
        process_group: all ranks where None.

    Returns:
        the same model; its modules, parameters and state dict stay as they are.
    """
    group = torch.distributed.group.WORLD if process_group is None else process_group
    if group is None:
        raise UserError("synchronised BatchNorm needs torch.distributed to be initialised")
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.group = group.group_name
    return model


class GroupNorm(_NormUnit, nn.GroupNorm):
    """``torch.nn.GroupNorm``, of every image by itself; torch's arguments, and ``step_mode``."""

    def _normalise(self, x: Tensor) -> Tensor:
        return self._over_time(super(_NormUnit, self).forward, x)
