"""The unit in float64, one step after the other, by autograd: written from the equations in docs/kernels.md
alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scalesnn.kernels.records import NeuronParameters
from scalesnn.kernels.source import surrogate_key

ATAN = surrogate_key("alpha / 2 / (1 + square(real(M_PI / 2) * alpha * x))", ("alpha",))


class Spike(torch.autograd.Function):
    """Heaviside with the derivative of ATan, alpha = 2."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad / (1 + (math.pi * x) ** 2)


@dataclass
class Neuron:
    """A neuron's settings."""

    charge: str = "leaky_with_input"
    tau: float = 1.7
    v_threshold: float = 0.9
    v_reset: float | None = 0.0
    detach_reset: bool = False
    learned: bool = False

    @property
    def parameters(self) -> NeuronParameters:
        """As the kernels have them."""
        numbers = (self.v_threshold, self.v_reset, self.detach_reset)
        return NeuronParameters(self.charge, *numbers, ATAN, (2.0,), self.tau)


def run(neuron: Neuron, y: Tensor, v: Tensor | float, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spikes and potentials [T, …] of the input currents y [T, …]."""
    rest = neuron.v_reset or 0.0
    spikes, potentials = [], []
    v = torch.full_like(y[0], v) if not isinstance(v, Tensor) else v
    rate = decay if decay is not None else 1 / torch.tensor(neuron.tau, dtype=y.dtype)
    for current in y:
        if neuron.charge == "integrate":
            h = v + current
        elif neuron.charge == "leaky_with_input":
            h = v + (current - (v - rest)) * rate
        else:
            h = v - (v - rest) * rate + current
        s = Spike.apply(h - neuron.v_threshold)
        r = s.detach() if neuron.detach_reset else s
        v = h - neuron.v_threshold * r if neuron.v_reset is None else h * (1 - r) + neuron.v_reset * r
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials)


NEURONS = [
    Neuron("integrate"),
    Neuron("integrate", v_reset=None, detach_reset=True),
    Neuron("leaky_with_input", v_reset=-0.2),
    Neuron("leaky_with_input", v_reset=None),
    Neuron("leaky", v_reset=0.1, detach_reset=True),
    Neuron("leaky", v_reset=None),
    Neuron("leaky_with_input", v_reset=-0.1, learned=True),
    Neuron("leaky", v_reset=None, detach_reset=True, learned=True),
    Neuron("leaky", v_reset=0.15, learned=True),
]
