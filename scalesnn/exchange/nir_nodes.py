"""What a layer is in NIR: one node for each.

NIR states continuous equations; with steps of ``DT`` seconds, Euler's method turns them into ours:

    tau dv/dt = (v_leak - v) + r I   LIF, decay_input: tau = τ DT, r = 1; else r = τ; v_leak = v_reset
    dv/dt = r I                      IF: r = 1 / DT

NIR fires at v > v_threshold, ours at ≥: the threshold that is written is the next smaller float32. NIR resets
to v_reset; it has no soft reset. Pedersen et al. 2024, "Neuromorphic intermediate representation".
"""

from __future__ import annotations

from typing import Any, TypeAlias

import nir
import numpy as np
import torch
from torch import Tensor, nn

from scalesnn.base import UserError
from scalesnn.neuron import BaseNode, IFNode, LIFNode, ParametricLIFNode

__all__ = ["DT", "AffineMap", "average_pool", "neuron_node", "refuse", "spike_max_pool"]

DT = 1e-4  # seconds a time-step: what SpikingJelly, snnTorch and Norse take when they read
Shape: TypeAlias = "tuple[int, ...]"  # of one image's values, without T and N


def refuse(where: str, what: str) -> UserError:
    """The error that names what NIR cannot say, and where it stands in the net."""
    return UserError(f"--format nir: {where}: {what}")


class AffineMap:
    """A convolution or linear layer, and the BatchNorms folded into it, in float64.

    Args:
        where: the layer's path in the net.
        module: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Linear``.
        shape: of its input.
    """

    def __init__(self, where: str, module: nn.Conv1d | nn.Conv2d | nn.Linear, shape: Shape) -> None:
        if not isinstance(module, nn.Linear) and module.padding_mode != "zeros":
            raise refuse(where, f"padding_mode {module.padding_mode!r}: NIR pads with zeros")
        if isinstance(module, nn.Linear) and len(shape) != 1:
            raise refuse(where, f"a linear layer on inputs {list(shape)}: NIR's takes vectors")
        self.module, self.shape = module, shape
        self.weight = module.weight.detach().double()
        self.bias = None if module.bias is None else module.bias.detach().double()

    def fold(self, norm: Any) -> None:
        """Let the map do what a BatchNorm in evaluation mode does after it."""
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        self.weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        self.bias = shift if self.bias is None else self.bias * scale + shift

    def node(self) -> nir.NIRNode:
        """The NIR node, in float32."""
        weight = _float32(self.weight)
        if isinstance(self.module, nn.Linear):
            return nir.Linear(weight) if self.bias is None else nir.Affine(weight, _float32(self.bias))
        bias = np.zeros(len(weight), np.float32) if self.bias is None else _float32(self.bias)
        module, one = self.module, isinstance(self.module, nn.Conv1d)
        padding = module.padding
        make = nir.Conv1d if one else nir.Conv2d
        return make(
            input_shape=self.shape[1] if one else self.shape[1:],
            weight=weight,
            stride=module.stride[0] if one else module.stride,
            padding=padding[0] if one and not isinstance(padding, str) else padding,
            dilation=module.dilation[0] if one else module.dilation,
            groups=module.groups,
            bias=bias,
        )


def neuron_node(where: str, neuron: BaseNode, shape: Shape) -> nir.NIRNode:
    """IF or LIF, with one set of values for each of the neurons ``shape``.

    Raises:
        UserError: a neuron, a reset or an output that NIR does not have.
    """
    if type(neuron) not in (IFNode, LIFNode, ParametricLIFNode):
        raise refuse(where, f"{type(neuron).__name__}: NIR has IF and LIF neurons")
    if neuron.v_reset is None:
        raise refuse(where, "soft reset (v_reset None): NIR's neurons reset to v_reset")
    if not neuron.surrogate_function.spiking:
        raise refuse(where, "a surrogate with spiking=False: NIR's neurons emit spikes")

    def full(value: float) -> np.ndarray:
        return np.full(shape, value, np.float32)

    ends = {"v_threshold": full(_below(neuron.v_threshold)), "v_reset": full(neuron.v_reset)}
    if isinstance(neuron, IFNode):
        return nir.IF(r=full(1 / DT), **ends)
    assert isinstance(neuron, LIFNode | ParametricLIFNode)
    tau = neuron.tau if isinstance(neuron, LIFNode) else 1 / neuron.w.detach().double().sigmoid().item()
    return nir.LIF(
        tau=full(tau * DT), r=full(1.0 if neuron.decay_input else tau), v_leak=full(neuron.v_reset), **ends
    )


def average_pool(where: str, module: nn.Module, shape: Shape, out_shape: Shape) -> nir.AvgPool2d:
    """An average pooling over two dimensions of space, adaptive or not.

    Raises:
        UserError: bins of different sizes, or options that NIR does not have.
    """
    if isinstance(module, nn.AdaptiveAvgPool2d):
        if any(size % out for size, out in zip(shape[1:], out_shape[1:], strict=True)):
            raise refuse(where, f"adaptive pooling of {list(shape)} to {list(out_shape)}: bins differ")
        kernel = [size // out for size, out in zip(shape[1:], out_shape[1:], strict=True)]
        return _pool(kernel, kernel, [0, 0])
    assert isinstance(module, nn.AvgPool2d)
    padding = _two(module.padding)
    if module.ceil_mode or module.divisor_override or (any(padding) and not module.count_include_pad):
        raise refuse(where, "ceil_mode, divisor_override and count_include_pad=False are not in NIR")
    return _pool(_two(module.kernel_size), _two(module.stride), padding)


def spike_max_pool(where: str, module: nn.MaxPool2d, out_shape: Shape) -> tuple[nir.AvgPool2d, nir.LIF]:
    """The largest of spikes, which NIR has no node for: the mean, and a neuron that fires where it is not 0.

    The mean of a window with a spike is at least 1 / size, of which LIF with tau = 2 steps takes half; a
    quarter of 1 / size is the threshold. Where it does not fire its input was 0, so nothing is left in v.

    Raises:
        UserError: dilation, ceil_mode or return_indices.
    """
    kernel = _two(module.kernel_size)
    if module.ceil_mode or module.return_indices or _two(module.dilation) != [1, 1]:
        raise refuse(where, "max pooling with dilation, ceil_mode or return_indices is not in NIR")

    def full(value: float) -> np.ndarray:
        return np.full(out_shape, value, np.float32)

    threshold = full(0.25 / (kernel[0] * kernel[1]))
    neuron = nir.LIF(tau=full(2 * DT), r=full(1), v_leak=full(0), v_threshold=threshold, v_reset=full(0))
    return _pool(kernel, _two(module.stride), _two(module.padding)), neuron


def _pool(kernel: list[int], stride: list[int], padding: list[int]) -> nir.AvgPool2d:
    return nir.AvgPool2d(np.array(kernel), np.array(stride), np.array(padding))


def _two(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _float32(values: Tensor) -> np.ndarray:
    return values.to(torch.float32).contiguous().cpu().numpy()


def _below(threshold: float) -> float:
    """The largest float32 that is smaller: what is above it has reached the threshold."""
    return float(np.nextafter(np.float32(threshold), np.float32(-np.inf)))
