"""One process, one device, nothing between the network and its optimizer."""

from __future__ import annotations

from typing import Any

from scalesnn.base import UserError
from scalesnn.parallel.strategy import MakeOptimizer, MakeScheduler, Strategy
from scalesnn.parallel.topology import Topology

__all__ = ["SingleStrategy"]


class SingleStrategy(Strategy):
    """Train on one device. The reference that the other strategies are compared with."""

    name = "single"
    needs_process_group = False

    def __init__(self, args: Any, topology: Topology) -> None:
        if topology.world_size > 1:
            raise UserError(
                f"--strategy single is for one process, but {topology.world_size} were started; "
                "give --strategy ddp, or start one"
            )
        super().__init__(args, topology)

    def _prepare(self, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        self.model = self.module
        self.optimizer = make_optimizer(self.module)
        self.scheduler = make_scheduler(self.optimizer)
