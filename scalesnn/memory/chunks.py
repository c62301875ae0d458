"""Policy ``time:K``: the sequence in chunks of K time-steps, the potentials carried from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalesnn import functional
from scalesnn.base import UserError
from scalesnn.memory.blocks import memories_of, nothing_changed, restore_memories
from scalesnn.memory.rematerialise import kept_as_recipes

if TYPE_CHECKING:
    from scalesnn.memory.policy import Policy

__all__ = ["run", "takes_batch_statistics"]


def takes_batch_statistics(net: nn.Module) -> bool:
    """Whether a layer of the net looks at all time-steps together."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in net.modules()
    )


def run(net: nn.Module, plain: Callable[..., Any], policy: Policy, x_seq: Tensor) -> Any:
    """The net's forward over ``x_seq`` [T, N, …] under a policy with ``time:K``.

    Raises:
        UserError: ``x_seq`` is no sequence.
    """
    if not isinstance(x_seq, Tensor) or x_seq.dim() < 3:
        raise UserError(f"{policy} cuts time, but the net was not given one sequence [T, N, …]")
    if not policy.chunk_norm and takes_batch_statistics(net):
        from scalesnn.memory.streaming import stream

        return stream(net, plain, policy, x_seq)
    outputs = []
    for x in x_seq.split(policy.steps):
        if policy.layer:
            with kept_as_recipes(net, policy.only):
                outputs.append(plain(x))
        elif policy.block:
            outputs.append(plain(x))
        else:
            outputs.append(_chunk(net, plain, x))
        if policy.detach:
            functional.detach_net(net)
    return torch.cat(outputs)


def _chunk(net: nn.Module, plain: Callable[..., Any], x: Tensor) -> Any:
    """One chunk: kept are its input and the potentials before it."""
    at_start = memories_of(net)
    is_first = [True]

    def again(x: Tensor) -> Any:
        if is_first:
            is_first.clear()
            return plain(x)
        with nothing_changed(net):
            restore_memories(at_start)
            return plain(x)

    return checkpoint(again, x, use_reentrant=False, preserve_rng_state=True)
