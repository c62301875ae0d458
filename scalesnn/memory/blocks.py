"""Modules that run again in backward (torch.utils.checkpoint): residual blocks, of which only the input is
kept, and, where no statistics span the sequence, the whole net by chunks of time-steps.

Running again changes nothing: running statistics and memories (potentials, dropout masks) are put back as
they were, random numbers are drawn from the same state, autocast is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalesnn import functional
from scalesnn.base import MemoryModule
from scalesnn.kernels.kept import keep

__all__ = ["install", "remove", "residual_blocks", "run_in_chunks", "takes_batch_statistics"]


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
        block.forward = partial(run_again, block, block.forward)


def remove(model: nn.Module) -> None:
    """Undo ``install``."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is run_again:
            del module.forward


def run_again(block: nn.Module, plain: Callable[[Tensor], Any], x: Tensor) -> Any:
    """``plain(x)``, of which autograd keeps ``x`` only, as bits where it is spikes."""
    if not torch.is_grad_enabled():
        return plain(x)
    at_start = _memories_of(block)
    needs_grad = x.requires_grad
    first: list[Tensor] = [x]
    kept, form = keep(x)
    kept = kept.detach()

    def run(_: Tensor) -> Any:
        if first:
            return plain(first.pop())
        again = kept.detach() if form is None else form.whole(kept)
        with _nothing_changed(block):
            _restore_memories(at_start)
            return plain(again.requires_grad_(needs_grad))

    # the empty tensor tells checkpoint on which device there are random numbers to restore
    return checkpoint(run, x.new_empty(0), use_reentrant=False, preserve_rng_state=True)


def takes_batch_statistics(net: nn.Module) -> bool:
    """Whether a layer of the net looks at all time-steps together."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in net.modules()
    )


def run_in_chunks(
    net: nn.Module, plain: Callable[[Tensor], Any], x_seq: Tensor, steps: int, again: bool, detach: bool
) -> Any:
    """The net's forward over ``x_seq`` [T, N, …], ``steps`` time-steps at a time.

    Args:
        again: keep of a chunk the input and the potentials before it, and run it again in backward.
        detach: no gradient goes from one chunk to the one before it.
    """
    outputs = []
    for x in x_seq.split(steps):
        outputs.append(run_again(net, plain, x) if again else plain(x))
        if detach:
            functional.detach_net(net)
    return torch.cat(outputs)


Memories = list[tuple[MemoryModule, dict[str, Any]]]


def _memories_of(module: nn.Module) -> Memories:
    """The values of all memories inside a module."""
    return [(m, dict(m.named_memories())) for m in module.modules() if isinstance(m, MemoryModule)]


def _restore_memories(saved: Memories) -> None:
    """Put back what ``_memories_of`` gave."""
    for module, values in saved:
        for name, value in values.items():
            setattr(module, name, value)


@contextmanager
def _nothing_changed(module: nn.Module) -> Iterator[None]:
    """Buffers (running statistics), memories and observers are afterwards as they were before."""
    memories = _memories_of(module)
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
        _restore_memories(memories)
