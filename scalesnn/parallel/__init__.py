"""How a network is trained on one device or many: one interface, one file a strategy."""

from scalesnn.parallel.arguments import add_parallel_arguments, create_strategy
from scalesnn.parallel.finite import NonFiniteLossError
from scalesnn.parallel.strategy import StepResult, Strategy
from scalesnn.parallel.topology import Topology

__all__ = [
    "NonFiniteLossError",
    "StepResult",
    "Strategy",
    "Topology",
    "add_parallel_arguments",
    "create_strategy",
]
