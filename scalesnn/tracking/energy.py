"""Synaptic operations and energy, after Horowitz 2014 (45 nm): an addition 0.9 pJ, a multiply-accumulate 4.6
pJ.

A layer that is fed spikes does one addition per spike and synapse: a spike at a place p of a conv's input
reaches ``fan_out(p)`` outputs (fewer at the border). Its synaptic operations are the sum of spikes(p) ·
fan_out(p), exactly, not rate times MACs. Inputs that are whole numbers (SEW's sum of spikes) count as that
many spikes. A layer fed with anything else, like the stem, does multiply-accumulates.

The equivalent ANN does every layer's multiply-accumulates once per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["PJ_PER_AC", "PJ_PER_MAC", "LayerWork", "SynapseCounter", "fan_out"]

PJ_PER_AC = 0.9
PJ_PER_MAC = 4.6


@dataclass
class LayerWork:
    """What one weight layer did in the measured forward passes.

    Attributes:
        spiking: it was fed with spikes or sums of spikes.
        non_negative: nothing below 0 came in at the first look.
        operations: additions for arriving spikes, exactly: a number on the device.
        macs: multiply-accumulates of all time-steps; those of a repeated image once.
        ann_macs: those of the ANN, which has no time-steps.
        images, steps: how many images, and time-steps of each.
        arrived_T: sum of the inputs at each time-step.
        inputs: number of input values at each time-step.
    """

    spiking: bool
    non_negative: bool
    operations: Tensor
    arrived_T: Tensor
    macs: float = 0.0
    ann_macs: float = 0.0
    images: int = 0
    steps: int = 0
    inputs: float = 0.0


@dataclass
class _Pass:
    """What one weight layer did in the forward pass that is going on, perhaps in several chunks of time."""

    macs: float = 0.0
    steps: int = 0  # that were computed
    images: int = 0
    time_steps: int = 0
    inputs: float = 0.0


class SynapseCounter:
    """Count what the conv and linear layers of a network do inside ``count()``.

    Attributes:
        macs_per_image: multiply-accumulates of one image over all time-steps and layers, spikes or not; 0
            until ``read`` has seen a pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        }
        self._fed: dict[str, tuple[bool, bool]] = {}
        self._fan_out: dict[tuple[str, torch.Size], Tensor] = {}
        self._layers: dict[str, LayerWork] = {}
        self._pass: dict[str, _Pass] = {}
        self.macs_per_image = 0.0

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count one forward pass."""
        self._pass = {}
        handles: list[RemovableHandle] = []
        for name, module in self._modules.items():

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                self._count(name, module, inputs[0].detach(), output.detach())

            handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, done in self._pass.items():
                layer = self._layers[name]
                layer.macs += done.macs
                layer.ann_macs += done.macs / done.steps
                layer.images += done.images
                layer.steps = done.time_steps
                layer.inputs += done.inputs / done.steps

    def layers(self) -> dict[str, LayerWork]:
        """What was counted since the last call, by the layer's path, in the order of the first pass."""
        layers, self._layers = self._layers, {}
        return layers

    def read(self) -> dict[str, float]:
        """Operations and energy per image of what was counted since the last call; empty if nothing was."""
        layers = self.layers()
        if not layers:
            return {}
        operations = macs = ann_macs = total = 0.0
        for layer in layers.values():
            if layer.spiking:
                operations += layer.operations.item() / layer.images
            else:
                macs += layer.macs / layer.images
            total += layer.macs / layer.images
            ann_macs += layer.ann_macs / layer.images
        self.macs_per_image = total
        snn_pj = operations * PJ_PER_AC + macs * PJ_PER_MAC
        ann_pj = ann_macs * PJ_PER_MAC
        return {
            "energy/synops_per_image": operations,
            "energy/macs_per_image": macs,
            "energy/ann_macs_per_image": ann_macs,
            "energy/snn_mj_per_image": snn_pj * 1e-9,
            "energy/ann_mj_per_image": ann_pj * 1e-9,
            "energy/ann_over_snn": ann_pj / snn_pj if snn_pj else float("inf"),
        }

    @torch.no_grad()
    def _count(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Add one call: x [N, C, H, W] or [T, N, C, H, W] of a conv, [N, features] or [T, N, features] of a
        linear.
        """
        leading = y.shape[:-3] if isinstance(module, nn.Conv2d) else y.shape[:-1]
        steps, images = (leading[0], leading[1]) if len(leading) == 2 else (1, leading.numel())
        repeats = 1
        if steps > 1 and y.stride(0) == 0:  # a repeated image is computed once
            x, y, steps, repeats = x[:1], y[:1], 1, steps
        done = self._pass.setdefault(name, _Pass(images=images))
        begin = done.time_steps
        done.steps += steps
        done.time_steps += steps * repeats
        done.inputs += x.numel()
        done.macs += y.numel() * _inputs_per_output(module)
        spiking, non_negative = self._fed_with(name, x)
        if name not in self._layers:
            nothing = torch.zeros((), dtype=torch.float64, device=x.device)
            self._layers[name] = LayerWork(spiking, non_negative, nothing, nothing.new_zeros(0))
        layer = self._layers[name]
        if len(layer.arrived_T) < done.time_steps:
            longer = layer.arrived_T.new_zeros(done.time_steps)
            longer[: len(layer.arrived_T)] = layer.arrived_T
            layer.arrived_T = longer
        arrived = x.reshape(steps, -1).sum(1, dtype=torch.float64)
        layer.arrived_T[begin : done.time_steps] += arrived.repeat(repeats)
        if spiking:
            layer.operations += self._operations(name, module, x, y)

    def _fed_with(self, name: str, x: Tensor) -> tuple[bool, bool]:
        """Whether the layer's inputs are spikes or sums of spikes, and whether they are 0 or more; looked at
        once, on the first input that is not 0.
        """
        if name not in self._fed:
            if not x.any():
                return True, True
            positive = bool((x >= 0).all())
            self._fed[name] = positive and bool((x == x.round()).all()), positive
        return self._fed[name]

    def _operations(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            return x.sum(dtype=torch.float64) * module.out_features
        assert isinstance(module, nn.Conv2d)
        key = (name, x.shape[-2:])
        if key not in self._fan_out:
            self._fan_out[key] = fan_out(module, x.shape[-2:], y.shape[-2:]).to(x.device)
        # float32 is exact here: T * N * C spikes at one place are fewer than 2**24
        spikes_HW = x.sum(list(range(x.dim() - 2)), dtype=torch.float32)
        return (spikes_HW * self._fan_out[key]).sum()


def _inputs_per_output(module: nn.Module) -> int:
    if isinstance(module, nn.Conv2d):
        return module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
    assert isinstance(module, nn.Linear)
    return module.in_features


def fan_out(conv: nn.Conv2d, size: torch.Size, out_size: torch.Size) -> Tensor:
    """How many outputs a spike at each place of ``conv``'s input reaches: float64, of shape ``size`` [H, W].

    The same for every input channel: a channel feeds the out_channels / groups channels of its group.
    """
    per_dim = []
    for dim in (0, 1):
        kernel, dilation = conv.kernel_size[dim], conv.dilation[dim]
        if isinstance(conv.padding, str):
            padding = dilation * (kernel - 1) // 2 if conv.padding == "same" else 0
        else:
            padding = conv.padding[dim]
        reads = torch.arange(out_size[dim])[:, None] * conv.stride[dim] - padding
        reads = reads + torch.arange(kernel)[None] * dilation  # [output, tap]: the input place that is read
        inside = reads[(reads >= 0) & (reads < size[dim])]
        per_dim.append(torch.bincount(inside, minlength=size[dim]).double())
    return torch.outer(*per_dim) * (conv.out_channels // conv.groups)
