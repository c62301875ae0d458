"""torch's layers that know step modes: ``'s'`` takes [N, …], as in torch; ``'m'`` takes a sequence [T, N, …].

The parameters, their names and their initial values are torch's. A sequence is handed to torch as [T × N,
…] without a copy, and keeps its memory format (channels_last included). A sequence that is one image
repeated (an expanded view, see ``functional.repeat_over_time``) is computed once where the layer has no
state of its own over time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalesnn.base import MemoryModule, MultiStepModule, StepModule, UserError
from scalesnn.functional import multi_step_forward, seq_to_ann_forward

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "Linear",
    "MaxPool2d",
    "MultiStepContainer",
    "SeqToANNContainer",
]


class _StepLayer(nn.Module, StepModule):
    """What the wrapped torch layers share. It stands before torch's class among a layer's bases."""

    def __init__(self, *args: Any, step_mode: str = "s", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_mode = step_mode

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        parts = (super().extra_repr(), f"step_mode={self.step_mode}")
        return ", ".join(part for part in parts if part)

    def _over_time(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run torch's ``forward`` on images, in either step mode."""
        _check_images(self, x)
        if self.step_mode == "s":
            return forward(x)
        if _is_repeated(x):
            y = forward(x[0])
            return y.expand(x.shape[0], *y.shape)
        return seq_to_ann_forward(x, forward)


def _check_images(layer: StepModule, x: Tensor) -> None:
    """Refuse an input that does not fit the step mode."""
    expected, shape = (4, "[N, C, H, W]") if layer.step_mode == "s" else (5, "[T, N, C, H, W]")
    if x.dim() == expected or (layer.step_mode == "s" and x.dim() == 3):
        return
    message = f"{type(layer).__name__} in step mode {layer.step_mode!r} expects {shape}, got {tuple(x.shape)}"
    if x.dim() == 5:
        message += ": call functional.set_step_mode(model, 'm')"
    elif x.dim() == 4:
        message += ": call functional.set_step_mode(model, 's'), or put the time-steps first"
    raise UserError(message)


def _is_repeated(x_seq: Tensor) -> bool:
    """Whether all time-steps are the same memory: an expanded view."""
    return x_seq.shape[0] > 1 and x_seq.stride(0) == 0


class Conv2d(_StepLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every image."""
        return self._over_time(super().forward, x)


class MaxPool2d(_StepLayer, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool every image."""
        return self._over_time(super().forward, x)


class AvgPool2d(_StepLayer, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool every image."""
        return self._over_time(super().forward, x)


class AdaptiveAvgPool2d(_StepLayer, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's argument, and
    ``step_mode``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool every image."""
        return self._over_time(super().forward, x)


class Linear(_StepLayer, nn.Linear):
    """``torch.nn.Linear`` for [N, …, features] or [T, N, …, features]; torch's arguments, and
    ``step_mode``."""


class Flatten(_StepLayer, nn.Flatten):
    """``torch.nn.Flatten``; ``start_dim`` and ``end_dim`` count without the time dimension, in either step
    mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten every sample."""
        return super().forward(x) if self.step_mode == "s" else seq_to_ann_forward(x, super().forward)


class _NormUnit(_StepLayer):
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
        if neuron is not None:
            spikes = self._fused(x, neuron, residual)
            if spikes is not None:
                return spikes
        y = self._normalise(x)
        if residual is not None:
            y = y + residual
        return y if neuron is None else neuron(y)

    def _fused(self, x: Tensor, neuron: nn.Module, residual: Tensor | None) -> Tensor | None:
        """The unit from a fused kernel; None where none can run."""
        return None

    def _normalise(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BatchNorm2d(_NormUnit, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, in step mode ``'m'`` with statistics over time, batch and space.

    torch's arguments, and ``step_mode``. ``forward(x, neuron, residual)``: the whole unit norm → (+
    residual) → neuron.
    """

    def _normalise(self, x: Tensor) -> Tensor:
        _check_images(self, x)
        normalise = super(_NormUnit, self).forward
        if self.step_mode == "s":
            return normalise(x)
        n = x[0].numel() // x.shape[2]
        if not _is_repeated(x) or n == 1:
            return seq_to_ann_forward(x, normalise)
        # One image repeated T times: the same mean and variance, but the running variance is the unbiased
        # one, whose n / (n - 1) has T times as many values.
        before = self.running_var.clone() if self.training and self.running_var is not None else None
        y = normalise(x[0])
        if before is not None and self.running_var is not None and self.num_batches_tracked is not None:
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            scale = (n - 1) / n * (n * x.shape[0]) / (n * x.shape[0] - 1)
            self.running_var.mul_(scale).add_(before, alpha=(1 - momentum) * (1 - scale))
        return y.expand(x.shape[0], *y.shape)


class GroupNorm(_NormUnit, nn.GroupNorm):
    """``torch.nn.GroupNorm``, of every image by itself; torch's arguments, and ``step_mode``."""

    def _normalise(self, x: Tensor) -> Tensor:
        return self._over_time(super(_NormUnit, self).forward, x)


class Dropout(MemoryModule):
    """Dropout with one mask for all time-steps of a sample, drawn anew after ``reset()``.

    Args:
        p: the probability that a value is dropped, in [0, 1).
    """

    mask: Tensor | None

    def __init__(self, p: float = 0.5, step_mode: str = "s") -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"p of Dropout must be in [0, 1), got {p}")
        self.p = p
        self.step_mode = step_mode
        self.register_memory("mask", None)

    def single_step_forward(self, x: Tensor) -> Tensor:
        """[N, …] to the same shape."""
        if not self.training:
            return x
        if self.mask is None:
            self.mask = F.dropout(torch.ones_like(x), self.p, training=True)
        elif self.mask.shape != x.shape:
            raise UserError(
                f"Dropout holds a mask of shape {tuple(self.mask.shape)} but got an input of shape "
                f"{tuple(x.shape)}: call functional.reset_net(net) between batches"
            )
        return x * self.mask

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, …] to the same shape, the same mask at every step."""
        if not self.training:
            return x_seq
        if self.mask is None:
            self.mask = F.dropout(torch.ones_like(x_seq[0]), self.p, training=True)
        return x_seq * self.mask

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"p={self.p}, step_mode={self.step_mode}"


class _SingleStepContainer(nn.Sequential, MultiStepModule):
    """A Sequential of modules in step mode ``'s'`` that takes sequences [T, N, …]."""

    keeps_step_mode_of_children = True

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        for module in self.modules():
            if module is not self and getattr(module, "step_mode", "s") != "s":
                raise UserError(
                    f"{type(module).__name__} inside {type(self).__name__} must have step_mode 's'"
                )


class MultiStepContainer(_SingleStepContainer):
    """Runs its single-step modules, stateful ones too, over a sequence [T, N, …], one step after the
    other."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, …] to [T, N, …]."""
        return multi_step_forward(x_seq, super().forward)


class SeqToANNContainer(_SingleStepContainer):
    """Runs stateless modules on all time-steps of a sequence [T, N, …] at once."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, …] to [T, N, …]."""
        return seq_to_ann_forward(x_seq, super().forward)
