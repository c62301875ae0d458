"""Poolings that know step modes."""

from __future__ import annotations

from torch import Tensor, nn

from scalesnn.kernels import spike_layers, spikes
from scalesnn.layer.step import Plain, StepLayer, is_repeated

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]


class MaxPool2d(StepLayer, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``.

    Where autograd records, the places of the maxima are kept in 2 bytes rather than 8; of an input that is
    known to be spikes only the bits are kept. Maxima of spikes are spikes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pool every image."""
        largest = spikes.is_spikes(x)
        if self.step_mode == "m" and x.requires_grad and not self.return_indices and x.dim() == 5:
            y = self._of_spikes(x) if largest and not is_repeated(x) else self._over_time(self._lean, x)
        else:
            y = self._over_time(super().forward, x)
        return spikes.mark_spikes(y, largest) if largest and isinstance(y, Tensor) else y

    def _lean(self, x: Tensor) -> Tensor:
        return spike_layers.max_pool2d(x, *self.geometry())[0]

    def _of_spikes(self, x: Tensor) -> Tensor:
        bits = spikes.bits_of(x)
        assert bits is not None
        return spike_layers.spike_max_pool2d(x.flatten(0, 1), *bits, *self.geometry()).unflatten(
            0, x.shape[:2]
        )

    def geometry(self) -> tuple[list[int], list[int], list[int], list[int], bool]:
        """Kernel size, stride, padding and dilation, each for height and width, and ceil_mode."""
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        kernel, stride, padding, dilation = ([s, s] if isinstance(s, int) else list(s) for s in sizes)
        return kernel, stride, padding, dilation, self.ceil_mode


class MaxPool1d(Plain, nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` for [N, C, L] or [T, N, C, L], with ``step_mode``."""

    spaces = (1,)


class MaxPool3d(Plain, nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` for [N, C, D, H, W] or [T, N, C, D, H, W], with ``step_mode``."""

    spaces = (3,)


class AvgPool1d(Plain, nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` for [N, C, L] or [T, N, C, L], with ``step_mode``."""

    spaces = (1,)


class AvgPool2d(Plain, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` for [N, C, H, W] or [T, N, C, H, W], with ``step_mode``."""

    spaces = (2,)


class AvgPool3d(Plain, nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` for [N, C, D, H, W] or [T, N, C, D, H, W], with ``step_mode``."""

    spaces = (3,)


class AdaptiveAvgPool1d(Plain, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` for [N, C, L] or [T, N, C, L], with ``step_mode``."""

    spaces = (1,)


class AdaptiveAvgPool2d(Plain, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` for [N, C, H, W] or [T, N, C, H, W], with ``step_mode``."""

    spaces = (2,)


class AdaptiveAvgPool3d(Plain, nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` for [N, C, D, H, W] or [T, N, C, D, H, W], with ``step_mode``."""

    spaces = (3,)
