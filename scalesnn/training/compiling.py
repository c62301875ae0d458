"""``--compile``: the network's forward and backward as one graph of torch.compile, without a break.

Training steps run compiled. Evaluations, and the steps at which spiking health is measured, run the network's
own forward: they come in other shapes, or look into the network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from scalesnn.base import UserError
from scalesnn.kernels.build import HAS_COMPILER
from scalesnn.memory.policy import Policy, policy_of
from scalesnn.neuron import BaseNode
from scalesnn.parallel.strategy import Strategy

__all__ = ["BACKEND", "CompiledForward", "check_compile", "compile_network"]

BACKEND = "inductor"  # of torch.compile
WHOLE = ("single", "ddp", "zero0", "zero1", "zero2")  # on these every rank holds the whole network


def check_compile(args: Any, strategy: Strategy) -> None:
    """Refuse ``--compile`` where the network cannot be one graph, before any long work.

    Raises:
        UserError: names the strategy, the policy or the tool that is in the way.
    """
    if not args.compile:
        return
    if strategy.sharding not in WHOLE:
        raise UserError(
            f"--compile: {strategy.sharding} gathers the parameters of a layer when it runs, which "
            "torch.compile cannot take into one graph; leave --compile out, or train with ddp or ZeRO 0 to 2"
        )
    policy = args.activation_checkpoint
    if policy != "auto" and Policy.parse(policy) != Policy():
        raise UserError(
            f"--compile goes with --activation-checkpoint none only, got {policy}: what recomputes cannot be "
            "one graph of torch.compile; leave one of the two out"
        )
    if strategy.device.type == "cpu" and not HAS_COMPILER:
        raise UserError("--compile needs a C++ compiler on PATH (g++, clang++ or $CXX)")
    if strategy.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton to compile for a GPU, and there is none here: leave it out")


def compile_network(args: Any, network: nn.Module) -> None:
    """Let the network's training steps run compiled, if ``--compile`` asks for it; nothing is compiled yet.

    Raises:
        UserError: ``--activation-checkpoint auto`` has chosen to recompute.
    """
    if not args.compile:
        return
    policy = policy_of(network)
    if policy != Policy():
        raise UserError(
            f"--compile goes with --activation-checkpoint none only, but auto chose {policy}: "
            "leave --compile out, or reduce --T or --batch-size"
        )
    network.forward = CompiledForward(network)


class CompiledForward:
    """A network's forward: compiled where it trains, else its own.

    Args:
        network: the plain network, before a strategy wraps it.
        backend: of torch.compile; None: ``BACKEND``.
    """

    def __init__(self, network: nn.Module, backend: str | None = None) -> None:
        self.network = network
        self.own: Callable[..., Any] = network.forward
        self.nodes = [module for module in network.modules() if isinstance(module, BaseNode)]
        self.compiled = torch.compile(
            self.own, backend=BACKEND if backend is None else backend, fullgraph=True, dynamic=False
        )

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run forward.

        Raises:
            UserError: torch.compile cannot take the network into one graph; says why.
        """
        measured = any(node.observer is not None for node in self.nodes)
        if measured or not (self.network.training and torch.is_grad_enabled()):
            return self.own(*inputs, **named)
        try:
            return self.compiled(*inputs, **named)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise UserError(
                f"--compile: torch.compile cannot take this network into one graph ({_reason(error)}); "
                "leave --compile out"
            ) from error


def _reason(error: BaseException) -> str:
    """What torch.compile says first, and its explanation, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines[1:] if line.startswith("Explanation:")]
    return " ".join([*lines[:1], *told[:1]]) or type(error).__name__
