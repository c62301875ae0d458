"""What a training step will need on one device, for every policy; and the cheapest policy that fits.

The activations come from ``trace`` (the real net under FakeTensorMode), the rest from the strategy: which
share of parameters, gradients and optimizer state a device holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesnn.base import UserError
from scalesnn.memory.blocks import residual_blocks
from scalesnn.memory.policy import Policy
from scalesnn.memory.trace import CPU, GPU, Device, Trace, fake_copy, trace

__all__ = [
    "OPTIMIZER_STATE",
    "STRATEGIES",
    "Plan",
    "Planner",
    "choose",
    "gib",
    "planner_of",
    "table",
    "table_of",
]

STRATEGIES = ("single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")
OPTIMIZER_STATE = {"sgd": 1, "sgd_nesterov": 1, "rmsprop": 2, "adamw": 2}  # tensors like the parameters
PREFETCH = 3  # batches that the input pipeline keeps on the device


@dataclass(frozen=True)
class Plan:
    """The prediction for one policy, in bytes a device.

    Attributes:
        activations: the most that is alive at a time of what autograd keeps and the working set together.
        saved: of these, what autograd keeps at the end of the forward pass.
        peak: of everything.
        step_time: relative to ``none``.
        largest_T, largest_batch: that fit, all else equal; 0: none does.
    """

    policy: Policy
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    input: int
    activations: int
    saved: int
    peak: int
    step_time: float
    fits: bool
    largest_T: int
    largest_batch: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "policy": str(self.policy)}


class Planner:
    """Predicts a training step of one net on one kind of device.

    Args:
        model: a real net, or one made under ``mode``.
        sample_shape: [T, N, C, H, W] (or [N, C, H, W]) of one device's batch.
        budget: bytes that a device has.
        strategy: one of STRATEGIES. optimizer: a key of OPTIMIZER_STATE. ema: whether an average is kept.
        amp_dtype: of autocast; None: without. static: the input is one image repeated over T.
        mode: the mode under which ``model`` was made, if it was.
    """

    def __init__(
        self,
        model: nn.Module,
        sample_shape: Sequence[int],
        budget: int,
        *,
        strategy: str = "single",
        world_size: int = 1,
        optimizer: str = "sgd",
        ema: bool = False,
        amp_dtype: torch.dtype | None = None,
        static: bool = True,
        device_type: str = "cuda",
        mode: FakeTensorMode | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise UserError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
        self.strategy = strategy
        self.mode = FakeTensorMode() if mode is None else mode
        self.model = fake_copy(model, self.mode) if mode is None else model
        self.shape, self.budget, self.world_size = tuple(sample_shape), budget, max(world_size, 1)
        self.amp_dtype, self.static = amp_dtype, static
        self.device: Device = GPU if device_type == "cuda" else CPU
        share = 1 / self.world_size
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        buffers = sum(b.numel() * b.element_size() for b in self.model.buffers())
        split = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}.get(strategy, 0)
        whole_block = 0
        if split == 3:  # what is gathered at a time: the largest block, or what stands outside of blocks
            blocks = [sum(p.numel() * 4 for p in b.parameters()) for b in residual_blocks(self.model)]
            whole_block = max([*blocks, weights - sum(blocks)])
        self.parameters = int(weights * (share if split == 3 else 1)) + whole_block + buffers
        self.gradient_share = share if split >= 2 else 1.0
        self.gradients = int(weights * self.gradient_share)
        states = OPTIMIZER_STATE.get(optimizer, 2)
        self.optimizer = int(states * weights * (share if split else 1))
        self.ema = int((weights + buffers) * (share if split == 3 else 1)) if ema else 0
        self.input = PREFETCH * math.prod(self.shape[-4:]) * (4 if amp_dtype is None else 2)
        self._traces: dict[tuple[Policy, tuple[int, ...]], Trace] = {}

    def trace(self, policy: Policy, shape: tuple[int, ...] | None = None) -> Trace:
        """One training step under a policy, counted; remembered."""
        key = (policy, self.shape if shape is None else shape)
        if key not in self._traces:
            self._traces[key] = trace(
                self.model,
                key[1],
                policy,
                mode=self.mode,
                amp_dtype=self.amp_dtype,
                rounding=self.device.rounding,
                static=self.static,
            )
        return self._traces[key]

    def peak(self, policy: Policy, shape: tuple[int, ...] | None = None) -> int:
        """Bytes of everything at the worst moment, with what the allocator may hold beside."""
        return self._constant + int(self.step_bytes(policy, shape) * (1 + self.device.slack))

    def step_bytes(self, policy: Policy, shape: tuple[int, ...] | None = None) -> int:
        """Bytes that are alive at the worst moment of a step, above what is there before it."""
        return int(max(self.trace(policy, shape).alive(self.gradient_share))) + self.device.overhead

    @property
    def _constant(self) -> int:
        return self.parameters + self.optimizer + self.ema + self.input

    def plan(self, policy: Policy) -> Plan:
        """The prediction for one policy."""
        found = self.trace(policy)
        peak = self.peak(policy)
        return Plan(
            policy,
            self.parameters,
            self.gradients,
            self.optimizer,
            self.ema,
            self.input,
            found.activations,
            found.saved,
            peak,
            found.seconds(self.device) / self.trace(Policy()).seconds(self.device),
            peak <= self.budget,
            self._largest_T(policy) if len(self.shape) == 5 else 0,
            self._largest_batch(policy),
        )

    @property
    def _room(self) -> float:
        """Bytes that are left for a step's activations and gradients."""
        return (self.budget - self._constant) / (1 + self.device.slack) - self.device.overhead

    def _largest_batch(self, policy: Policy) -> int:
        """The largest batch that fits: activations grow with it, gradients do not."""
        return max(
            int(
                min(
                    (self._room - self.gradient_share * gradients) * self.shape[-4] / max(activations, 1)
                    for activations, gradients in self.trace(policy).events
                )
            ),
            0,
        )

    def _largest_T(self, policy: Policy) -> int:
        """The largest T that fits, by a line through two traces for every event of a step; for the peak where
        more chunks of time make more events."""
        K = policy.steps
        far = max(self.shape[0], 3 * K, 2)
        near = 2 * K if K else far // 2
        low, high = (self.trace(policy, (T, *self.shape[1:])).alive(self.gradient_share) for T in (near, far))
        if len(low) != len(high):
            low, high = [max(low)], [max(high)]
        if max(high) > self._room and all(a >= b for a, b in zip(low, high, strict=True)):
            return 0
        fits = (
            far + (self._room - b) * (far - near) / (b - a) for a, b in zip(low, high, strict=True) if b > a
        )
        return max(int(min(fits, default=far)), 0)

    def policies(self) -> list[Policy]:
        """The exact policies worth trying, by predicted time."""
        names = ["none", "layer", "block"]
        if len(self.shape) == 5:
            T = self.shape[0]
            if T > 1:
                names.append(f"time:{max(T // 4, 1)}")
        found = [Policy.parse(name) for name in names]
        return [p for p in found if not p.block or residual_blocks(self.model)]

    def cheapest(self) -> Policy | None:
        """The policy that fits at the least predicted time; None where none does."""
        fitting = [policy for policy in self.policies() if self.peak(policy) <= self.budget]
        return min(fitting, key=lambda policy: self.trace(policy).seconds(self.device), default=None)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def planner_of(
    args: Any,
    model: nn.Module,
    sample_shape: Sequence[int],
    strategy_name: str,
    world_size: int,
    device: torch.device,
    budget: int,
) -> Planner:
    """The planner of a training run, from its flags; makes a copy of the net that has sizes only."""
    amp = device.type == "cuda" and not getattr(args, "disable_amp", False)
    return Planner(
        model,
        sample_shape,
        budget,
        strategy=strategy_name,
        world_size=world_size,
        optimizer=getattr(args, "opt", "sgd"),
        ema=bool(getattr(args, "model_ema", False)),
        amp_dtype=torch.bfloat16 if amp else None,
        device_type=device.type,
    )


def choose(planner: Planner) -> tuple[Policy, int, str]:
    """The cheapest policy that fits the budget, its predicted peak in bytes, and a line for the log.

    Raises:
        UserError: none fits; names the largest T and batch that would.
    """
    budget, policy = planner.budget, planner.cheapest()
    if policy is None:
        least = planner.plan(min(planner.policies(), key=planner.peak))
        raise UserError(
            f"nothing fits {gib(budget)}: {least.policy} needs {gib(least.peak)}; the largest T that fits is "
            f"{least.largest_T} at this batch size, the largest batch {least.largest_batch} at this T"
        )
    peak, none = planner.peak(policy), planner.trace(Policy())
    slower = planner.trace(policy).seconds(planner.device) / none.seconds(planner.device)
    return (
        policy,
        peak,
        f"activation checkpointing: {policy}, predicted peak {gib(peak)} of {gib(budget)}, "
        f"{slower:.2f} × the time of none",
    )


def table_of(planner: Planner) -> str:
    """The table of all policies."""
    return table([planner.plan(policy) for policy in planner.policies()])


def table(plans: list[Plan]) -> str:
    """The plans as a table of text."""
    head = ["policy", "peak", "fits", "time", "activations", "kept", "parameters", "gradients", "optimizer"]
    head += ["EMA", "input", "largest T", "largest batch"]
    rows = [head]
    for p in plans:
        rows.append(
            [str(p.policy), gib(p.peak), "yes" if p.fits else "no", f"{p.step_time:.2f} ×"]
            + [
                gib(b)
                for b in (p.activations, p.saved, p.parameters, p.gradients, p.optimizer, p.ema, p.input)
            ]
            + [str(p.largest_T), str(p.largest_batch)]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows)
