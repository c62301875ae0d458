"""Large T: activation checkpointing across layers, blocks and time-steps, and a planner that makes it fit."""

from scalesnn.memory.allocator import keep_freed_blocks
from scalesnn.memory.arguments import Prepared, add_memory_arguments, prepare
from scalesnn.memory.policy import Policy, apply_policy, policy_of

__all__ = [
    "Policy",
    "Prepared",
    "add_memory_arguments",
    "apply_policy",
    "keep_freed_blocks",
    "policy_of",
    "prepare",
]
