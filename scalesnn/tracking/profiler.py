"""``--profile N``: N steps under torch.profiler, as a trace for chrome://tracing or Perfetto, and in plain
words.

The two steps before them warm the profiler up. Afterwards the ten costliest operators are printed, and how
the time divides between neuron kernels (fused ones normalise as well), convolutions, normalisation,
communication and waiting for data.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

__all__ = ["DATA_SPAN", "StepProfiler", "profiler_enabled", "shares_of", "top_operators"]

DATA_SPAN = "scalesnn: waiting for data"
_GROUPS = (  # the first that matches an operator's or a kernel's name
    ("communication", "nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast_|barrier"),
    ("normalisation", "batch_?norm|group_?norm|bn_(fw|bw)"),
    ("convolution", "conv|cudnn|implicit_?gemm|xmma|fprop|dgrad|wgrad|winograd|cutlass"),
    ("neuron kernels", "scalesnn(::|_)|neuron|spike|surrogate"),
)


def profiler_enabled() -> bool:
    """Whether a profiler of torch is recording."""
    return bool(torch._C._autograd._profiler_enabled())


class StepProfiler:
    """Record ``steps`` steps; call ``step`` at the end of every training step.

    Args:
        steps: how many steps to record; 0 does nothing.
        folder: where trace.json goes.
        say: takes the lines of the result (``tracker.notice``).
        device: where the network runs.
    """

    def __init__(
        self, steps: int, folder: Path, say: Callable[[str], None], device: torch.device | str = "cpu"
    ) -> None:
        self._steps = steps
        self._folder = folder
        self._say = say
        self._cuda = torch.device(device).type == "cuda"
        self._done = 0
        self._profile: Any = None
        self._began = 0.0

    def step(self) -> None:
        """One training step is over."""
        if not self._steps or self._done > 1 + self._steps:
            return
        if self._done == 0:  # the first step compiles and allocates, the second warms the profiler up
            self._start()
        elif self._done == 1:
            self._profile.step()
            self._began = time.perf_counter()
        elif self._done == 1 + self._steps:
            self._finish(time.perf_counter() - self._began)
        else:
            self._profile.step()
        self._done += 1

    def close(self) -> None:
        """Stop recording, if the training ends before all steps are recorded; what there is, is thrown
        away.
        """
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            self._say(f"--profile {self._steps}: the training ended too early, no trace is written")

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=self._steps)
        self._profile = torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True)
        self._profile.start()

    def _finish(self, wall_s: float) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json"
        profile.export_chrome_trace(str(trace))
        averages = profile.key_averages()
        self._say(f"{self._steps} steps profiled, {wall_s / self._steps:.4f} s a step: {trace}")
        for line in top_operators(averages, self._cuda):
            self._say(line)
        shares = shares_of(averages, wall_s, self._cuda)
        self._say(
            "share of the time: " + ", ".join(f"{name} {100 * part:.1f} %" for name, part in shares.items())
        )


def top_operators(averages: Iterable[Any], cuda: bool, most: int = 10) -> list[str]:
    """The ``most`` costliest kernels (CUDA) or operators (CPU) by their own time, a line each: milliseconds,
    share, calls, name.
    """
    rows = [(_own_us(event, cuda), event.count, event.key) for event in averages if _counts(event, cuda)]
    total = sum(row[0] for row in rows) or 1.0
    rows.sort(reverse=True)
    head = f"{'ms':>10}{'share':>8}{'calls':>8}  {'kernel' if cuda else 'operator'}"
    lines = [
        f"{us / 1e3:>10.2f}{100 * us / total:>7.1f}%{calls:>8}  {key[:70]}" for us, calls, key in rows[:most]
    ]
    return [head, *lines]


def shares_of(averages: Iterable[Any], wall_s: float, cuda: bool) -> dict[str, float]:
    """How the recorded time divides: the wait for data as a share of the wall clock, the rest by the own time
    of kernels (CUDA) or operators (CPU), scaled to what remains.
    """
    own = dict.fromkeys([name for name, _ in _GROUPS] + ["other"], 0.0)
    data_us = 0.0
    for event in averages:
        if event.key == DATA_SPAN:
            data_us += float(event.cpu_time_total)  # the span has a second entry, of the GPU, with 0
        elif _counts(event, cuda):
            group = next((name for name, part in _GROUPS if re.search(part, event.key, re.I)), "other")
            own[group] += _own_us(event, cuda)
    data = min(1.0, data_us / 1e6 / wall_s) if wall_s else 0.0
    total = sum(own.values()) or 1.0
    return {"data": data, **{name: us / total * (1 - data) for name, us in own.items()}}


def _own_us(event: Any, cuda: bool) -> float:
    return float(event.self_device_time_total if cuda else event.self_cpu_time_total)


def _counts(event: Any, cuda: bool) -> bool:
    """Whether an entry's own time is part of the whole.

    On CUDA an operator's own time is that of its kernels, which have entries of their own: only those count.
    Stretches that are only marked (steps, phases, NCCL's calls) do not count.
    """
    if cuda and (event.device_type == DeviceType.CPU or event.is_user_annotation):
        return False
    return not event.key.startswith(("scalesnn: ", "ProfilerStep", "autograd::engine::evaluate_function"))
