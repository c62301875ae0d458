"""The memory flags, and what the Trainer does with them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from scalesnn.base import UserError
from scalesnn.memory.policy import Policy, apply_policy

__all__ = ["Prepared", "add_memory_arguments", "bytes_of", "prepare"]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_memory_arguments(parser: Any) -> None:
    """Add --activation-checkpoint and --memory-budget."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--activation-checkpoint",
        default="none",
        metavar="POLICY",
        help="what backward computes again instead of keeping: none, layer, block, time:K, "
        "auto (cheapest that fits --memory-budget); see docs/memory.md",
    )
    group.add_argument(
        "--memory-budget",
        default="auto",
        metavar="BYTES",
        help="of auto: what one device may use, such as 70GiB; auto: what is free on the GPU (or in RAM) now",
    )


def bytes_of(text: str, flag: str = "--memory-budget") -> int:
    """``70GiB``, ``70GB``, ``70G`` (as GiB) or plain bytes, as a number.

    Raises:
        UserError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", text.strip().lower())
    if not found or not float(found[1]):
        raise UserError(f"{flag} must be a size such as 70GiB, got {text!r}")
    number, unit, suffix = found.groups()
    size = UNITS[unit] if suffix == "b" else 1024 ** "kmgt".index(unit) * 1024 if unit else 1
    return int(float(number) * size)


def free_memory(device: torch.device) -> int:
    """What is free on the device now, less a reserve for what no plan sees: 10 % and 2 GB on a GPU (NCCL's
    buffers, cuDNN's workspaces, DALI), 5 % in RAM."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return max(0, int(free * 0.9) - 2 * 10**9)
    import psutil

    return int(psutil.virtual_memory().available * 0.95)


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` leaves for the run.

    Attributes:
        notices: lines for the log: the policy, and what ``auto`` expects of it.
        planned_bytes: the predicted peak of a device, where ``auto`` has planned.
        table: makes the plan's table of all policies; takes seconds.
    """

    notices: list[str]
    planned_bytes: int | None
    table: Callable[[], str]


def prepare(
    args: argparse.Namespace,
    model: nn.Module,
    sample_shape: Sequence[int],
    strategy_name: str,
    world_size: int,
    device: torch.device,
) -> Prepared:
    """Give the net the policy of --activation-checkpoint, after ``load_model`` and before the strategy.

    Args:
        args: with activation_checkpoint and memory_budget; disable_amp, opt, model_ema where there.
        sample_shape: of the net's input for one batch, [T, N, C, H, W] (or [N, C, H, W]).
        strategy_name: single, ddp, zero0 … zero3 or fsdp.

    Raises:
        UserError: no such policy; or ``auto`` and nothing fits: names the largest T and batch that would.
    """
    from scalesnn.memory.planner import choose, planner_of, table_of

    text = args.activation_checkpoint
    budget = free_memory(device) if args.memory_budget == "auto" else bytes_of(args.memory_budget)
    planner = planner_of(args, model, sample_shape, strategy_name, world_size, device, budget)
    table = partial(table_of, planner)
    if text == "auto":
        policy, peak, notice = choose(planner)
        apply_policy(model, policy)
        return Prepared([notice], peak, table)
    policy = Policy.parse(text)
    if args.memory_budget != "auto":
        raise UserError(f"--memory-budget needs --activation-checkpoint auto, got {text}")
    if policy.steps and len(sample_shape) != 5:
        raise UserError(f"--activation-checkpoint {text} cuts time, but the net's input has no time-steps")
    apply_policy(model, policy)
    notices = [] if text == "none" else [f"activation checkpointing: {policy}"]
    if policy.chunk_norm:
        notices.append(
            "bn=chunk: BatchNorm statistics are those of each chunk: not the same network as without"
        )
    if policy.detach:
        notices.append("detach: gradients do not pass chunk borders (truncated backpropagation through time)")
    return Prepared(notices, None, table)
