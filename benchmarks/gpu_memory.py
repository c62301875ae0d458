"""The part of gpu-check that looks at memory: the plan against the GPU's own count, and the largest T.

``memory(report, device)`` goes into ``gpu_check.PARTS``; the results stand under ``parts.memory``.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from common import make_ours, make_spikingjelly, static_images
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesnn import functional
from scalesnn.memory import Policy, apply_policy
from scalesnn.memory.planner import Planner

__all__ = ["largest_T", "memory", "step"]

POLICIES = ("none", "layer", "block", "time:4")
NET, T, N, SIZE = "spiking_resnet50", 16, 16, 224


def step(model: nn.Module, reset: Any, T: int, device: torch.device) -> tuple[int, float]:
    """Peak bytes and seconds of one bf16 training step; the gradients are dropped after it."""
    x, y = static_images(T, N, SIZE, device=str(device), channels_last=True)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x).mean(0).float(), y)
    loss.backward()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device)
    reset(model)
    model.zero_grad(set_to_none=True)
    return peak, seconds


def largest_T(model: nn.Module, reset: Any, device: torch.device, start: int, report: Any) -> int:
    """The largest T that runs, to an eighth: doubled until it fails, then halved in between."""

    def runs(T: int) -> bool:
        try:
            step(model, reset, T, device)
        except torch.OutOfMemoryError:
            reset(model)
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            return False
        return True

    low, high = 0, start
    while runs(high) and not report.out_of_time():
        low, high = high, high * 2
    while high - low > max(low // 8, 1) and not report.out_of_time():
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low


def planner(T: int, budget: int) -> Planner:
    """Of the net as ``step`` trains it: no optimizer, no input pipeline."""
    mode = FakeTensorMode()
    with mode:
        model = make_ours(NET)
    return Planner(model, (T, N, 3, SIZE, SIZE), budget, amp_dtype=torch.bfloat16, mode=mode)


def memory(report: Any, device: torch.device) -> None:
    """Measure every policy, then the largest T; SpikingJelly's where it can be imported."""
    found: dict[str, Any] = {"net": NET, "T": T, "N": N, "size": SIZE, "policies": {}}
    report.record["parts"]["memory"] = found
    budget = torch.cuda.mem_get_info(device)[0]
    plan = planner(T, budget)
    model = make_ours(NET).to(device, memory_format=torch.channels_last)
    for name in POLICIES:
        apply_policy(model, name)
        step(model, functional.reset_net, 2, device)
        torch.cuda.empty_cache()
        peak, _ = step(model, functional.reset_net, T, device)
        seconds = min(step(model, functional.reset_net, T, device)[1] for _ in range(2))
        predicted = plan.step_bytes(Policy.parse(name)) + plan.parameters
        row = {"peak": peak, "predicted": predicted, "error": predicted / peak - 1, "seconds": seconds}
        found["policies"][name] = row
        row["time_ratio"] = seconds / found["policies"]["none"]["seconds"]
        print(
            f"  {name:14} {peak / 2**30:6.2f} GiB (plan {predicted / 2**30:6.2f}), {seconds * 1e3:6.0f} ms, "
            f"{row['time_ratio']:.2f} x none"
        )
        report.write()
    for name in ("none", "time:4"):
        if report.out_of_time():
            break
        apply_policy(model, name)
        expected = plan.plan(Policy.parse(name)).largest_T
        actual = largest_T(model, functional.reset_net, device, max(expected // 2, 1), report)
        found[f"largest T of {name}"] = {"predicted": expected, "measured": actual}
        print(f"  largest T of {name}: {actual}, predicted {expected}")
        report.write()
    if report.importable("spikingjelly") and not report.out_of_time():
        from spikingjelly.activation_based import functional as peer

        del model
        torch.cuda.empty_cache()
        other = make_spikingjelly(NET).to(device)
        found["largest T of SpikingJelly"] = largest_T(other, peer.reset_net, device, 8, report)
        print(f"  largest T of SpikingJelly: {found['largest T of SpikingJelly']}")
        report.write()
