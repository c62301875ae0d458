"""DistributedDataParallel: the whole model on every rank, gradients averaged while backward still runs."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scalesnn.parallel.strategy import MakeOptimizer, MakeScheduler, Strategy

__all__ = ["DDPStrategy"]


class DDPStrategy(Strategy):
    """Train with DDP.

    Running statistics are not broadcast at every step (``--ddp-broadcast-buffers`` asks for it): they are
    averaged before they are used. Options: ``--ddp-static-graph`` (the same parameters take part in every
    step), ``--ddp-bf16-gradients`` (gradients travel as bfloat16: half the traffic, rounded).
    """

    name = "ddp"
    wrapped: DistributedDataParallel
    _knows_graph = False

    def _prepare(self, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        known = inspect.signature(DistributedDataParallel).parameters
        word = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        broadcast: dict[str, Any] = {word: bool(getattr(self.args, "ddp_broadcast_buffers", False))}
        self.wrapped = DistributedDataParallel(
            self.module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **broadcast,
            gradient_as_bucket_view=True,
            static_graph=bool(getattr(self.args, "ddp_static_graph", False)),
        )
        if getattr(self.args, "ddp_bf16_gradients", False):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            self.wrapped.register_comm_hook(None, bf16_compress_hook)
        self.model = self.wrapped
        self.optimizer = make_optimizer(self.module)
        self.scheduler = make_scheduler(self.optimizer)

    def _reduction(self) -> AbstractContextManager[Any]:
        """Reduce gradients only with the last micro-batch of a step (and, with a static graph, with the
        very first, from which DDP learns the graph)."""
        reduces = self.closes_step or (self.wrapped.static_graph and not self._knows_graph)
        return contextlib.nullcontext() if reduces else self.wrapped.no_sync()

    def autocast(self) -> AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(self._reduction())
        stack.enter_context(super().autocast())
        return stack

    def _backward(self, loss: Tensor) -> None:
        with self._reduction():
            super()._backward(loss)
        self._knows_graph = True

    @property
    def evaluation_model(self) -> nn.Module:
        return self.module
