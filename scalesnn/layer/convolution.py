"""Convolutions that know step modes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalesnn.kernels import spike_layers, spikes
from scalesnn.layer.step import StepLayer, is_repeated

__all__ = ["Conv2d"]


class Conv2d(StepLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``.

    Of an input that is known to be spikes, only the bits are kept for the weight's gradient. On the CPU their
    sums are looked up rather than multiplied (``kernels.spike_conv``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every image."""
        plain = self.step_mode == "s" or x.dim() != 5 or is_repeated(x)
        if plain or self.padding_mode != "zeros" or isinstance(self.padding, str) or not self._pays(x):
            return self._over_time(super().forward, x)
        return self._of_spikes(x)

    def _pays(self, x: Tensor) -> bool:
        """Whether the bits of ``x`` are of use: to be kept, or to be looked up."""
        largest = spikes.is_spikes(x)
        return largest > 0 and (torch.is_grad_enabled() or (largest == 1 and x.device.type == "cpu"))

    def _of_spikes(self, x: Tensor) -> Tensor:
        bits = spikes.bits_of(x)
        assert bits is not None
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        y = spike_layers.spike_conv2d(x.flatten(0, 1), *bits, weight, bias, *geometry)
        return y.unflatten(0, x.shape[:2])
