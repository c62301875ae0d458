"""A net as a function of tensors: T time-steps at once, or one step with the potentials handed in and out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from scalesnn import functional
from scalesnn.base import MemoryModule, UserError
from scalesnn.neuron import BaseNode

__all__ = ["OneStep", "Unrolled", "plain_net"]


def plain_net(net: nn.Module, backend: str) -> nn.Module:
    """A copy of the net for export: on the CPU, in evaluation mode, without gradients.

    Args:
        backend: of neurons and normalisations: 'torch' for torch's own operators, 'auto' for the fused ones.
    """
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    functional.set_backend(net, backend)
    return net


class Unrolled(nn.Module):
    """Images [N, C, H, W], each shown T times, or event frames [N, T, C, H, W], to the mean logits [N, K].

    Args:
        net: after ``plain_net``.
        T: time-steps.
    """

    def __init__(self, net: nn.Module, T: int) -> None:
        super().__init__()
        functional.set_step_mode(net, "m")
        self.net, self.T = net, T

    def forward(self, images: Tensor) -> Tensor:
        """Run T steps from rest."""
        functional.reset_net(self.net)
        frames = images.dim() == 5
        x_TNCHW = images.transpose(0, 1) if frames else functional.repeat_over_time(images, self.T)
        logits = self.net(x_TNCHW).mean(0)
        functional.reset_net(self.net)
        return logits


class OneStep(nn.Module):
    """One time-step: (images [N, C, H, W], potentials) to (logits [N, K], potentials).

    Args:
        net: after ``plain_net``.
        images: an example.

    Attributes:
        names: of the neurons, in the order of their potentials.
        rest: their potentials before the first step, for ``images``.

    Raises:
        UserError: another layer than the neurons keeps something from step to step.
    """

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        super().__init__()
        functional.set_step_mode(net, "s")
        functional.reset_net(net)
        with torch.no_grad():
            net(images)
        memories = {name: module for name, module in net.named_modules() if isinstance(module, MemoryModule)}
        for name, module in memories.items():
            if not isinstance(module, BaseNode) and any(isinstance(m, Tensor) for m in module.memories()):
                raise UserError(f"{name} ({type(module).__name__}) keeps a state that cannot be exported")
        used = {n: m for n, m in memories.items() if isinstance(m, BaseNode) and isinstance(m.v, Tensor)}
        self.net, self.names, self._nodes = net, list(used), tuple(used.values())
        shapes = [torch.empty_like(node.v) for node in self._nodes if isinstance(node.v, Tensor)]
        functional.reset_net(net)
        self.rest = [
            torch.full_like(shape, node.v_reset or 0.0)
            for shape, node in zip(shapes, self._nodes, strict=True)
        ]

    def forward(self, images: Tensor, *potentials: Tensor) -> tuple[Tensor, ...]:
        """Run the step."""
        for node, v in zip(self._nodes, potentials, strict=True):
            node.v = v
        logits = self.net(images)
        after = [node.v for node in self._nodes if isinstance(node.v, Tensor)]
        functional.reset_net(self.net)
        return (logits, *after)
