"""Which activations are kept for the backward pass, and which are computed again: ``apply_policy``.

    none         what the fused units keep: the convolution's output and the spikes' bits
    layer        the spikes' bits and the BatchNorm statistics; backward runs the convolution again
    block        the bits at the borders of residual blocks; backward runs the block again
    time:K       as layer, by K time-steps: forward and backward hold K steps of a convolution's output.
                 layer+time:K is another name for it
    ,detach      after time:K: truncated backpropagation through time, no gradient through chunk borders
    ,bn=chunk    after time:K: BatchNorm statistics of each chunk. Faster, and another network

Every policy but the last two gives the loss, gradients, running statistics and potentials of ``none``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn import layer
from scalesnn.base import UserError
from scalesnn.kernels import spikes
from scalesnn.kernels.deferred import Deferred
from scalesnn.kernels.kept import keep
from scalesnn.memory import blocks
from scalesnn.memory.deferral import Streaming
from scalesnn.neuron import BaseNode

__all__ = ["Policy", "apply_policy", "policies_below", "policy_of"]

SMALLEST = 4096  # elements of spikes that are kept as bits
SYNTAX = "none, layer, block, time:K (with ,detach or ,bn=chunk after it) or auto"
OPTIONS = {"detach": "detach", "bn=chunk": "chunk_norm"}


@dataclass(frozen=True)
class Policy:
    """A policy, parsed.

    Attributes:
        layer: run convolutions again in backward. block: run residual blocks again.
        steps: K of time:K; 0 where time is not cut. detach, chunk_norm: its options.
    """

    layer: bool = False
    block: bool = False
    steps: int = 0
    detach: bool = False
    chunk_norm: bool = False

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read ``none``, ``layer``, ``block``, ``time:4``, ``time:4,detach``, ``layer+time:4,bn=chunk`` …

        Raises:
            UserError: the text is no policy (``auto`` is not one either: the planner turns it into one).
        """
        base, *options = text.strip().split(",")
        policy = cls()
        for word in base.split("+"):
            if word == "none" and base == "none":
                continue
            if word in ("layer", "block") and not getattr(policy, word):
                policy = replace(
                    policy, layer=policy.layer or word == "layer", block=policy.block or word == "block"
                )
            elif (found := re.fullmatch(r"time:(\d+)", word)) and int(found[1]) >= 1 and not policy.steps:
                policy = replace(policy, steps=int(found[1]))
            else:
                raise UserError(f"unknown activation-checkpoint policy {text!r}: use {SYNTAX}")
        for option in options:
            if option not in OPTIONS or not policy.steps:
                raise UserError(f"unknown activation-checkpoint policy {text!r}: use {SYNTAX}")
            changes: dict[str, Any] = {OPTIONS[option]: True}
            policy = replace(policy, **changes)
        if policy.block and (policy.layer or (policy.steps and not policy.chunk_norm)):
            raise UserError(
                f"activation-checkpoint policy {text!r}: block goes with time:K,bn=chunk only; "
                "a block run again keeps nothing that layer or time:K could save"
            )
        return replace(policy, layer=policy.layer and not (policy.steps and not policy.chunk_norm))

    def __str__(self) -> str:
        words = [word for word in ("layer", "block") if getattr(self, word)]
        words += [f"time:{self.steps}"] if self.steps else []
        text = "+".join(words) or "none"
        return text + "".join(f",{option}" for option, name in OPTIONS.items() if getattr(self, name))

    @property
    def exact(self) -> bool:
        """Whether it gives the same gradients and statistics as ``none``."""
        return not (self.detach or self.chunk_norm)


def apply_policy(model: nn.Module, policy: str | Policy) -> nn.Module:
    """Give a net an activation-checkpoint policy, in place; the one it had is taken off.

    Works on every net made of ``scalesnn.layer`` and ``scalesnn.neuron`` in step mode ``'m'``,
    before or after it is moved, and before it is wrapped by DDP, DeepSpeed, FSDP2 or ``torch.compile``
    (the net then runs uncompiled). Parameters, their names and the state dict stay as they are.

    Args:
        policy: see the module's docstring.

    Returns:
        the same model.

    Raises:
        UserError: no such policy, or ``auto`` (see ``scalesnn.memory.prepare``, which plans).
    """
    if policy == "auto":
        raise UserError("activation-checkpoint auto needs to know the input: call scalesnn.memory.prepare")
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    _take_off(model)
    if policy == Policy():
        return model
    streaming = Streaming(0 if policy.chunk_norm else policy.steps, policy.detach and not policy.chunk_norm)
    if policy.layer or (policy.steps and not policy.chunk_norm):
        for module in model.modules():
            if isinstance(module, layer.Conv2d):
                module.policy = streaming
            if isinstance(module, BaseNode) and streaming.detach:
                module.truncate = policy.steps
    if policy.block:
        blocks.install(model)
    model.forward = partial(_run, model, model.forward, policy, streaming)
    return model


def _take_off(model: nn.Module) -> None:
    blocks.remove(model)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _run:
            del module.forward
        if isinstance(module, layer.Conv2d):
            module.policy = None
        if isinstance(module, BaseNode):
            module.truncate = 0


def _run(
    net: nn.Module, plain: Callable[..., Any], policy: Policy, streaming: Streaming, *args: Any, **kwargs: Any
) -> Any:
    """The net's own forward, under the policy where autograd records; never inside a compiled graph."""
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    # as a decorator it would load torch's compiler, which takes two seconds, in every run
    run = torch.compiler.disable(_run_recorded) if torch.compiler.is_compiling() else _run_recorded
    return run(net, plain, policy, streaming, *args, **kwargs)


def _run_recorded(
    net: nn.Module, plain: Callable[..., Any], policy: Policy, streaming: Streaming, *args: Any, **kwargs: Any
) -> Any:
    x_seq: Any = args[0] if args else None
    if policy.steps and (not isinstance(x_seq, Tensor) or x_seq.dim() < 3 or len(args) > 1 or kwargs):
        raise UserError(f"{policy} cuts time, but the net was not given one sequence [T, N, …]")
    with _spikes_as_bits():
        if policy.steps and (policy.chunk_norm or not blocks.takes_batch_statistics(net)):
            again = not (policy.layer or policy.block)
            run = partial(streaming.paused_in, plain) if again else plain
            return blocks.run_in_chunks(net, run, x_seq, policy.steps, again, policy.detach)
        out = plain(*args, **kwargs)
    return out.plain() if isinstance(out, Deferred) else out


def policy_of(model: nn.Module) -> Policy:
    """The policy of a net (or of the net inside DDP's or DeepSpeed's wrapper)."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        forward = inner.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _run:
            policy: Policy = forward.args[2]
            return policy
        inner = getattr(inner, "module", None)
    return Policy()


def policies_below(policy: Policy, T: int | None) -> list[Policy]:
    """The exact policies that need less memory than ``policy``, the one that needs most first.

    Args:
        T: time-steps; None for inputs without.
    """
    chunks, steps = [], (T or 1) // 2
    while T and steps >= 1:
        chunks.append(Policy(steps=steps))
        steps //= 4
    if policy.steps:
        return [p for p in chunks if p.steps < policy.steps]
    return chunks if policy.layer or policy.block else [Policy(layer=True), *chunks]


@contextmanager
def _spikes_as_bits() -> Iterator[None]:
    """Inside, spikes that torch's own operations save for the backward pass are kept as bits."""

    def pack(tensor: Tensor) -> Any:
        if tensor.numel() < SMALLEST or isinstance(tensor, nn.Parameter):
            return tensor
        kept, form = keep(tensor) if spikes.is_spikes(tensor) else (tensor, None)
        return tensor if form is None else (kept, form)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].whole(kept[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
