"""What a unit is made from, by chunks of time-steps: a convolution's output, and what is added to it.

Each holds tensors that autograd keeps: ``parts`` takes it apart for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scalesnn.kernels import ops, spike_conv, spike_layers
from scalesnn.kernels.kept import Spikes
from scalesnn.layer import Conv2d

__all__ = ["Convolution", "Source", "Stored", "is_scattered", "spans"]

LARGE = 16  # times a weight's size is the input of a chunk whose gradients come in pieces
PIECES = 2
Parts = tuple[Callable[..., "Source | Stored"], list[Tensor | None]]


def is_scattered(parameter: object) -> bool:
    """Whether ZeRO-3 gathers the parameter for its module's calls only."""
    return hasattr(parameter, "ds_tensor")


def spans(total: int, steps: int) -> list[tuple[int, int]]:
    """The chunks of ``total`` time-steps: ``steps`` each, or one of all where 0."""
    steps = steps or max(total, 1)
    return [(a, min(a + steps, total)) for a in range(0, total, steps)]


class Convolution(NamedTuple):
    """A convolution of a sequence without its tensors.

    Attributes:
        form: of the input where its bits are kept; None: the input itself is.
        shape, x_dtype: of the input [T, N, C, H, W].
        dtype: in which it is computed. cast: by autocast; else inputs and weights have it.
        out_shape, out_stride: of the output [T, N, outputs, H, W].
        looks_up: it is made from the bits alone (``kernels.spike_conv``).
        geometry: stride, padding, dilation, groups.
    """

    form: Spikes | None
    shape: torch.Size
    x_dtype: torch.dtype
    dtype: torch.dtype
    cast: bool
    out_shape: tuple[int, ...]
    out_stride: tuple[int, ...]
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
    looks_up: bool

    @classmethod
    def of(cls, module: Conv2d, x: Tensor, form: Spikes | None) -> Convolution:
        """The module's, of ``x``, under the autocast of now."""
        kind, padding = x.device.type, module.padding
        assert not isinstance(padding, str)
        cast = torch.is_autocast_enabled(kind) and (form is not None or x.dtype != torch.float64)
        dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
        geometry = (module.stride, padding, module.dilation, module.groups)
        height, width = (
            (size + 2 * pad - dilate * (taps - 1) - 1) // step + 1
            for size, taps, step, pad, dilate in zip(
                x.shape[3:], module.kernel_size, module.stride, padding, module.dilation, strict=True
            )
        )
        channels, image = module.out_channels, height * width
        stride = (x.shape[1] * channels * image, channels * image, 1, width * channels, channels)
        out_shape = (*x.shape[:2], channels, height, width)
        looks_up = (
            form is not None
            and dtype == x.dtype
            and spike_conv.suits(x.flatten(0, 1), form.planes, module.weight, module.groups)
        )
        return cls(form, x.shape, x.dtype, dtype, cast, out_shape, stride, geometry, looks_up)

    def values_of(self, parameter: Tensor | None) -> Tensor | None:
        """Its values in the dtype of the convolution, in channels_last; of a scattered one a copy, which
        stays."""
        if parameter is None:
            return None
        values = parameter.detach().to(self.dtype) if self.cast else parameter.detach()
        values = values.clone() if is_scattered(parameter) else values
        return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


class Source:
    """A convolution's output by chunks, normalised if there is a normalisation. Autograd does not see it.

    Attributes:
        kept: the convolution's input: bits, or itself. weight, bias: in the dtype of the convolution.
        affine: [4, C] of the normalisation (``records.UnitInputs``).
        x: the input itself, as long as it is there; ``version`` as it was.
        held: the chunk that was made last, for the next sweep, which begins with it.
    """

    def __init__(
        self,
        conv: Convolution,
        kept: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        affine: Tensor | None = None,
        x: Tensor | None = None,
    ) -> None:
        self.conv, self.kept, self.weight, self.bias, self.affine = conv, kept, weight, bias, affine
        self.x, self.version = x, 0 if x is None else x._version
        self.held: tuple[int, Tensor] | None = None

    def normalised(self, affine: Tensor) -> Source:
        """The same with a normalisation; takes over what is held."""
        source = Source(self.conv, self.kept, self.weight, self.bias, affine, self.x)
        source.version, source.held, self.held = self.version, self.held, None
        return source

    def parts(self) -> Parts:
        """What makes it again from its tensors, and these."""
        return partial(Source, self.conv), [self.kept, self.weight, self.bias, self.affine]

    def output(self, a: int, b: int, hold: bool = False) -> Tensor:
        """The convolution's output in the steps from ``a`` to ``b``, a chunk."""
        if self.x is not None and self.x._version != self.version:
            raise RuntimeError("a convolution's input was changed in place before its output was used")
        held, self.held = self.held, None
        if held is not None and held[0] == a:
            y = held[1]
        else:
            del held
            y = self._convolve(a, b)
        if hold:
            self.held = (a, y)
        return y

    def steps(self, a: int, b: int) -> Tensor:
        """The same, normalised if there is a normalisation."""
        y = self.output(a, b)
        return y if self.affine is None else ops.normalise(y, self.affine)

    def _convolve(self, a: int, b: int) -> Tensor:
        images, bits = self._images(a, b)
        form, geometry = self.conv.form, self.conv.geometry
        if form is None or bits is None:
            y = torch.conv2d(images, self.weight, self.bias, *geometry)
        else:
            y = spike_layers.spike_conv2d(images, bits, form.planes, self.weight, self.bias, *geometry)
        return y.unflatten(0, (b - a, self.conv.shape[1]))

    def pieces(self, a: int, b: int) -> list[tuple[int, int]]:
        """The parts of a chunk of which gradients are made at a time: one where all steps are one chunk, as
        without a policy, and where weights are large, whose gradients are added up."""
        chunk, weights = (b - a) * self.conv.shape[1:].numel(), self.weight.numel()
        large = b - a < self.conv.shape[0] and chunk > LARGE * weights
        return [(a + start, a + end) for start, end in spans(b - a, -(-(b - a) // PIECES) if large else 0)]

    def gradients(self, of_y: Tensor, a: int, b: int, mask: list[bool]) -> list[Tensor | None]:
        """The gradients of input, weight and bias that ``mask`` asks for, from that of the output's steps."""
        images, bits = self._images(a, b, read=mask[1])
        sizes = None if self.bias is None else list(self.bias.shape)
        of_y = of_y.flatten(0, 1).to(self.conv.dtype)
        of_x, *others = spike_layers.convolution_backward(
            of_y, images, bits, self.weight, sizes, mask, *self.conv.geometry
        )
        of_x = None if of_x is None else of_x.unflatten(0, (b - a, self.conv.shape[1])).to(self.conv.x_dtype)
        return [of_x, *others]

    def _images(self, a: int, b: int, read: bool = True) -> tuple[Tensor, Tensor | None]:
        """Steps of the input as images [K × N, C, H, W], and their bits if these are read instead; images
        that are not read have no values."""
        form, bits = self.conv.form, None
        if form is not None and self.conv.looks_up:
            bits = form.bits_of_steps(self.kept, a, b)
        if form is None or self.x is not None:
            x = (self.kept if self.x is None else self.x)[a:b]
        elif bits is not None or not read:
            shape, device = (b - a, *form.shape[1:]), self.kept.device
            x = torch.empty_strided(shape, form.stride, dtype=self.conv.dtype, device=device)
        else:
            x = form.steps(self.kept, a, b)
        return x.flatten(0, 1).to(self.conv.dtype), bits


class Stored:
    """A residual that is kept as bits, or as it is.

    Attributes:
        form, kept: see ``kept.keep``. dense: the residual itself, as long as it is there.
    """

    def __init__(self, form: Spikes | None, kept: Tensor, dense: Tensor | None = None) -> None:
        self.form, self.kept, self.dense = form, kept, dense

    def parts(self) -> Parts:
        """As ``Source.parts``."""
        return partial(Stored, self.form), [self.kept]

    def steps(self, a: int, b: int) -> Tensor:
        """The steps from ``a`` to ``b``."""
        if self.dense is None and self.form is not None:
            return self.form.steps(self.kept, a, b)
        return (self.kept if self.dense is None else self.dense)[a:b]

    def bits(self, a: int, b: int, like: Tensor) -> Tensor | None:
        """The same as bits, if they are in the order of ``like``'s memory."""
        if self.form is None or self.form.planes or self.form.stride[1:] != like.stride()[1:]:
            return None
        return self.kept[a:b]
