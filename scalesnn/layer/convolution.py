"""Convolutions that know step modes, in channels_last.

Neurons, BatchNorm and convolutions of spikes are faster where a position's channels are neighbours in memory.
So ``Conv2d`` keeps its weight that way, and its outputs come that way, whatever the format of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scalesnn.kernels import spike_layers, spikes
from scalesnn.layer.step import Plain, StepLayer, is_repeated, is_watched

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ConvolutionPolicy",
]


class ConvolutionPolicy(Protocol):
    """What an activation-checkpoint policy does for a convolution."""

    def defer(self, module: Conv2d, x: Tensor) -> Tensor | None:
        """The output for ``x`` [T, N, C, H, W], deferred; None: the module makes it."""
        ...


class Conv2d(StepLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``.

    Of an input that is known to be spikes, only the bits are kept for the weight's gradient. On the CPU their
    sums are looked up rather than multiplied (``kernels.spike_conv``).

    The weight lies in channels_last. One that does not (FSDP2, ZeRO, ``.to(memory_format=
    torch.contiguous_format)``) gives the same outputs in the same format.

    Attributes:
        policy: makes the output of a sequence that autograd records; set by ``memory.apply_policy``.
    """

    policy: ConvolutionPolicy | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lay_weight_last()

    def forward(self, x: Tensor, instead: Callable[[Tensor], Any] | None = None) -> Any:
        """Convolve every image; the output's images are channels_last.

        Args:
            instead: called with ``x`` in the place of the convolution, while ZeRO-3 has gathered the weight.
        """
        if instead is not None:
            return instead(x)
        plain = self.step_mode == "s" or x.dim() != 5 or is_repeated(x)
        if not plain and self.policy is not None and torch.is_grad_enabled() and not is_watched(self):
            deferred = self.policy.defer(self, x)
            if deferred is not None:
                return deferred
        if plain or self.padding_mode != "zeros" or isinstance(self.padding, str) or not self._pays(x):
            return self._over_time(self._convolve, x)
        return self._of_spikes(x)

    def _convolve(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W]."""
        if x.dtype == torch.float64 and x.device.type == "cpu" and self.groups > 1:
            # not oneDNN's: torch's own is 1.5 (32 groups) to 6 times (depthwise) as fast when contiguous
            return _last(self._conv_forward(x.contiguous(), self.weight.contiguous(), self.bias))
        # torch converts images by itself, and autograd keeps them as they came. Activations are converted
        # here: with groups, torch's backward from contiguous ones is up to 1.7 times slower
        x = _last(x) if x.requires_grad else x
        return self._conv_forward(x, self._weight_for(x), self.bias)

    def _weight_for(self, x: Tensor) -> Tensor:
        """The weight, in a format with which the output is channels_last: one of the two has to be."""
        return self.weight if _lies_last(x) else _last(self.weight)

    def _pays(self, x: Tensor) -> bool:
        """Whether the bits of ``x`` are of use: to be kept, or to be looked up."""
        largest = spikes.is_spikes(x)
        return largest > 0 and (torch.is_grad_enabled() or (largest == 1 and x.device.type == "cpu"))

    def _of_spikes(self, x: Tensor) -> Tensor:
        bits = spikes.bits_of(x)
        assert bits is not None
        bias = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
            weight = self.weight.to(dtype, memory_format=torch.channels_last)
        else:
            weight = self._weight_for(x)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        y = spike_layers.spike_conv2d(x.flatten(0, 1), *bits, weight, bias, *geometry)
        return y.unflatten(0, x.shape[:2])

    def _lay_weight_last(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None and type(weight.data) is Tensor:  # a DTensor is laid out by its strategy
            weight.data = _last(weight.data)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if local_metadata.get("assign_to_params_buffers"):  # else the values were copied into the weight
            self._lay_weight_last()


def _lies_last(x: Tensor) -> bool:
    """Whether torch takes images or a weight for channels_last: the strides say so even with one channel."""
    return x.stride(-3) == 1 and x.movedim(-3, -1).is_contiguous()


def _last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] itself if it is channels_last, else a copy that is; one image [C, H, W] as it is."""
    # not contiguous(): that of one channel counts as channels_last with any strides
    return x if x.dim() != 4 or _lies_last(x) else x.clone(memory_format=torch.channels_last)


class Conv1d(Plain, nn.Conv1d):
    """``torch.nn.Conv1d`` for [N, C, L] or [T, N, C, L], with ``step_mode``."""

    spaces = (1,)


class Conv3d(Plain, nn.Conv3d):
    """``torch.nn.Conv3d`` for [N, C, D, H, W] or [T, N, C, D, H, W], with ``step_mode``."""

    spaces = (3,)


class ConvTranspose1d(Plain, nn.ConvTranspose1d):  # type: ignore[misc]  # no output_size
    """``torch.nn.ConvTranspose1d`` for [N, C, L] or [T, N, C, L], with ``step_mode``."""

    spaces = (1,)


class ConvTranspose2d(Plain, nn.ConvTranspose2d):  # type: ignore[misc]  # no output_size
    """``torch.nn.ConvTranspose2d`` for [N, C, H, W] or [T, N, C, H, W], with ``step_mode``."""

    spaces = (2,)


class ConvTranspose3d(Plain, nn.ConvTranspose3d):  # type: ignore[misc]  # no output_size
    """``torch.nn.ConvTranspose3d`` for [N, C, D, H, W] or [T, N, C, D, H, W], with ``step_mode``."""

    spaces = (3,)
