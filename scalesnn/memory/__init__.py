"""Large T: activation checkpointing across layers, blocks and time-steps, and a planner that makes it fit."""

from scalesnn.memory.arguments import add_memory_arguments, prepare
from scalesnn.memory.policy import Policy, apply_policy, policy_of

__all__ = ["Policy", "add_memory_arguments", "apply_policy", "policy_of", "prepare"]
