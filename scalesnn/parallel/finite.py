"""What happens when a loss is not finite: found on all ranks together, traced to a layer, stopped or left
out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn import functional
from scalesnn.parallel.state import persistent_buffers

__all__ = ["BatchMemory", "NonFiniteLossError", "find_first_bad_layer"]

PATIENCE = 25  # steps left out one after the other before --on-nan skip gives up


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the weights are those from before the step. The text says at which
    step, on which rank, and in which layer."""


class BatchMemory:
    """Keeps hold of the network's newest input, and of its buffers as they were before it.

    A batch whose loss is not finite has left NaN in the running statistics; ``restore`` takes them back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inputs: tuple[Any, ...] = ()
        self.buffers: dict[str, Tensor] = {}
        module.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        self.inputs = inputs
        for name, buffer in persistent_buffers(module).items():
            if name in self.buffers:
                self.buffers[name].copy_(buffer)
            else:
                self.buffers[name] = buffer.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back as they were before the newest batch."""
        for name, buffer in persistent_buffers(self.module).items():
            buffer.copy_(self.buffers[name])

    def trace(self, autocast: Callable[[], AbstractContextManager[Any]]) -> str | None:
        """Run the newest batch again and say where the first value that is not finite comes from;
        collective."""
        if not self.inputs:
            return None
        with torch.no_grad(), torch.random.fork_rng(), autocast():
            functional.reset_net(self.module)
            found = find_first_bad_layer(self.module, self.inputs)
            functional.reset_net(self.module)
        self.restore()
        return found


def find_first_bad_layer(module: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """Run ``module`` and name what first holds NaN or infinity: the input, a weight, or a layer's output.

    Every layer runs, whatever is found, since under ZeRO-3 and FSDP2 all ranks must.
    """
    found: list[str] = []
    if not all(is_finite(x) for x in inputs):
        found.append("the input of the network")
    handles = []
    for name, part in module.named_modules():
        if next(part.children(), None) is None:
            handles.append(part.register_forward_hook(reporter(name, found)))
    try:
        output = module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found and not is_finite(output):
        found.append("the output of the network")
    return found[0] if found else None


def reporter(name: str, found: list[str]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A forward hook that notes the layer if its output or its weights are not finite."""

    def report(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if found or is_finite(output):
            return
        bad = [n for n, p in part.named_parameters(recurse=False) if not is_finite(p)]
        layer = f"layer {name} ({type(part).__name__})"
        found.append(f"{layer}: its {bad[0]} is not finite" if bad else f"the output of {layer}")

    return report


def is_finite(value: Any) -> bool:
    """Whether a tensor holds neither NaN nor infinity; True of everything else."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    value = value.to_local() if hasattr(value, "to_local") else value
    return bool(torch.isfinite(value.detach()).all())
