"""Which activations are kept for the backward pass, and which are computed again: ``apply_policy``.

    none         what the fused units keep: the convolution's output and the spikes' bits
    layer        the spikes' bits and the BatchNorm statistics; backward runs the convolution again
    block        the bits at the borders of residual blocks; backward runs the block again
    time:K       time in chunks of K steps: of each unit the bits, and the potentials at chunk borders;
                 forward and backward hold K steps of a unit at a time
    layer+time:K as time:K, without the potentials: they come again in backward. With more than four chunks
                 the net's front runs again in sweeps, so that its gradients never stand whole
    ,whole       after layer+time:K: they do stand whole. Faster, and larger
    ,detach      after time:K: truncated backpropagation through time, no gradient through chunk borders
    ,bn=chunk    after time:K: BatchNorm statistics of each chunk. Faster, and another network

Every policy but the last two gives the loss, gradients, running statistics and potentials of ``none``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from scalesnn.base import UserError
from scalesnn.memory import blocks, front, rematerialise, streaming
from scalesnn.memory.mixins import put_before

__all__ = ["Policy", "apply_policy", "policy_of"]

SYNTAX = "none, layer, block, time:K, layer+time:K (with ,detach ,bn=chunk or ,whole after a time) or auto"
OPTIONS = {"detach": "detach", "bn=chunk": "chunk_norm", "whole": "whole"}


@dataclass(frozen=True)
class Policy:
    """A policy, parsed.

    Attributes:
        layer: run convolutions again in backward. block: run residual blocks again.
        steps: K of time:K; 0 where time is not cut. detach, chunk_norm, whole: its options.
        only: of ``layer``, the names of the convolutions to run again; None: all of them.
    """

    layer: bool = False
    block: bool = False
    steps: int = 0
    detach: bool = False
    chunk_norm: bool = False
    whole: bool = False
    only: frozenset[str] | None = None

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
        if policy.whole and (not policy.layer or policy.chunk_norm):
            raise UserError(f"activation-checkpoint policy {text!r}: whole goes with layer+time:K only")
        if policy.block and (policy.layer or (policy.steps and not policy.chunk_norm)):
            raise UserError(
                f"activation-checkpoint policy {text!r}: block goes with time:K,bn=chunk only; "
                "a block run again keeps nothing that layer or time:K could save"
            )
        return policy

    def __str__(self) -> str:
        words = [word for word in ("layer", "block") if getattr(self, word)]
        if self.only is not None:
            words[0] += f" ({len(self.only)} convolutions)"
        words += [f"time:{self.steps}"] if self.steps else []
        text = "+".join(words) or "none"
        return text + "".join(f",{option}" for option, name in OPTIONS.items() if getattr(self, name))

    @property
    def exact(self) -> bool:
        """Whether it gives the same gradients and statistics as ``none``."""
        return not (self.detach or self.chunk_norm)


class _Governed:
    """Mixin put before the class of a net that has a policy: its training forward runs under it."""

    _memory_policy: Policy

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The net's own forward, under the policy where autograd records."""
        plain = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        policy, net = self._memory_policy, self
        assert isinstance(net, nn.Module)
        if policy.steps:
            from scalesnn.memory import chunks

            return chunks.run(net, plain, policy, *args, **kwargs)
        with keeping(net, policy):
            return plain(*args, **kwargs)


def keeping(net: nn.Module, policy: Policy) -> AbstractContextManager[None]:
    """What ``policy`` keeps of a forward pass that runs inside this context (``layer`` and ``block``)."""
    if policy.layer or policy.block:
        return rematerialise.kept_as_recipes(net, policy.only)
    return nullcontext()


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
    blocks.remove(model)
    streaming.remove(model)
    front.remove(model)
    if isinstance(model, _Governed):
        model.__class__ = type(model).__mro__[2]
        del model._memory_policy
    if policy == Policy():
        return model
    put_before(model, _Governed)
    setattr(model, "_memory_policy", policy)  # noqa: B010 (mypy cannot know the new class)
    if policy.block:
        blocks.install(model)
    if policy.steps and not policy.chunk_norm:
        streaming.install(model)
        if policy.layer:
            front.install(model)
    elif policy.layer:
        streaming.install_pools(model)
    return model


def policy_of(model: nn.Module) -> Policy:
    """The policy of a net (or of the net inside DDP's or DeepSpeed's wrapper)."""
    for module in _inner(model):
        if isinstance(module, _Governed):
            return module._memory_policy
    return Policy()


def _inner(model: nn.Module | None) -> Iterator[nn.Module]:
    while isinstance(model, nn.Module):
        yield model
        model = getattr(model, "module", None)
