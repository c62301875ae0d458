"""Policy ``block``: of a residual block only the input is kept; backward runs the block again.

Running it again changes nothing: running statistics and memories (potentials, dropout masks) are put back as
they were, random numbers are drawn from the same state, autocast is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalesnn.base import MemoryModule
from scalesnn.kernels import spikes
from scalesnn.memory.mixins import put_before, take_off
from scalesnn.memory.rematerialise import KeptSpikes

__all__ = ["install", "memories_of", "nothing_changed", "remove", "residual_blocks", "restore_memories"]


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of several layers inside the containers of a net: its blocks.

    Containers are the net itself, ``nn.Sequential`` and ``nn.ModuleList``. A net that is one chain of layers
    has no blocks.
    """
    found: list[nn.Module] = []
    waiting = list(model.children())
    while waiting:
        module = waiting.pop(0)
        if isinstance(module, nn.Sequential | nn.ModuleList):
            waiting[:0] = list(module.children())
        elif sum(1 for m in module.modules() if any(True for _ in m.parameters(recurse=False))) > 1:
            found.append(module)
    return found


def install(model: nn.Module) -> None:
    """Have every block of the net run again in backward."""
    for block in residual_blocks(model):
        put_before(block, _RunAgain)


def remove(model: nn.Module) -> None:
    """Undo ``install``."""
    take_off(model, _RunAgain)


class _RunAgain:
    """Mixin put before a block's class."""

    def forward(self, x: Tensor) -> Any:
        """The block's own forward, of which autograd keeps the input only."""
        plain = super().forward  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        if not torch.is_grad_enabled():
            return plain(x)
        return run_again(self, plain, x)


def run_again(block: nn.Module, plain: Any, x: Tensor) -> Any:
    """``plain(x)``, of which autograd keeps ``x`` only, as bits where it is spikes."""
    at_start = memories_of(block)
    needs_grad = x.requires_grad
    first: list[Tensor] = [x]
    kept: Any = KeptSpikes(x) if spikes.is_spikes(x) and x.stride(0) != 0 else x.detach()

    def run(_: Tensor) -> Any:
        if first:
            return plain(first.pop())
        again = kept() if isinstance(kept, KeptSpikes) else kept.detach()
        with nothing_changed(block):
            restore_memories(at_start)
            return plain(again.requires_grad_(needs_grad))

    # the empty tensor tells checkpoint on which device there are random numbers to restore
    return checkpoint(run, x.new_empty(0), use_reentrant=False, preserve_rng_state=True)


Memories = list[tuple[MemoryModule, dict[str, Any]]]


def memories_of(module: nn.Module) -> Memories:
    """The values of all memories inside a module."""
    return [(m, dict(m.named_memories())) for m in module.modules() if isinstance(m, MemoryModule)]


def restore_memories(saved: Memories) -> None:
    """Put back what ``memories_of`` gave."""
    for module, values in saved:
        for name, value in values.items():
            setattr(module, name, value)


@contextmanager
def nothing_changed(module: nn.Module) -> Iterator[None]:
    """Buffers (running statistics), memories and observers are afterwards as they were before."""
    memories = memories_of(module)
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    observers = [(m, m.observer) for m in module.modules() if getattr(m, "observer", None) is not None]
    for node, _ in observers:
        setattr(node, "observer", None)  # noqa: B010
    try:
        yield
    finally:
        for node, observer in observers:
            node.observer = observer
        for buffer, value in buffers:
            buffer.data.copy_(value)  # .data: autograd may hold the buffer, unread
        restore_memories(memories)
