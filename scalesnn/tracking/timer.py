"""Where the time of a training step goes, and what it buys: a clock cheap enough to be always on.

    for images, targets in timer.data(loader):        # waiting for data
        with timer.phase("forward"): …
        with timer.phase("backward"): …
        with timer.phase("optimizer"): …
        if due: record.update(timer.read())           # means since the last read

On CUDA a phase is a pair of events, read back only in ``read``: no step waits for the device. Elsewhere it
is a pair of ``perf_counter`` calls. Gradient communication overlaps the backward pass; what does not
overlap, the time from the moment the last gradient is computed until ``backward`` ends, is reported as
communication (``watch_communication``).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import record_function

from scalesnn.tracking.peaks import peak_flops
from scalesnn.tracking.profiler import DATA_SPAN, profiler_enabled

__all__ = ["StepTimer", "peak_memory"]

Batch = TypeVar("Batch")


class StepTimer:
    """Time the phases of training steps.

    Args:
        device: where the network runs; CUDA is timed with events.
        world_size: number of devices that share the work; rates count all of them.
        time_steps: T, for the rate in time-steps.
        hours_before: device-hours that earlier processes of the run have used.

    Attributes:
        flops_per_image: FLOPs of training on one image (``SpikeMonitor.training_flops_per_image``); set it
            to have the utilisation reported.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        world_size: int = 1,
        time_steps: int = 1,
        hours_before: float = 0.0,
    ) -> None:
        self.device = torch.device(device)
        self.world_size = world_size
        self.time_steps = time_steps
        self.flops_per_image: float | None = None
        self._hours_before = hours_before
        self._born = time.perf_counter()
        self._cuda = self.device.type == "cuda"
        self._host: dict[str, float] = {}
        self._pairs: list[tuple[str, Any, Any]] = []
        self._spare: list[Any] = []
        self._gradient_end: Any = None
        self._paused = False
        self._running: float | None = None  # since when the wall clock of `data` runs; None: it stands
        self._wall = 0.0
        self._batches = self._images = 0

    def data(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Hand the batches on, timing the wait for each; the wall clock runs only while this is iterated.

        Images are counted from the first tensor of a batch, [N, …].
        """
        iterator = iter(batches)
        self._running = time.perf_counter()
        try:
            while True:
                before = time.perf_counter()
                try:
                    with self._span(DATA_SPAN):
                        batch = next(iterator)
                except StopIteration:
                    return
                self._host["data_wait"] = self._host.get("data_wait", 0.0) + time.perf_counter() - before
                self._batches += 1
                first = batch[0] if isinstance(batch, list | tuple) else batch
                self._images += first.shape[0] if isinstance(first, torch.Tensor) else 0
                yield batch
        finally:
            self._lap()
            self._running = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A context whose duration counts as ``name``: "forward", "backward", "optimizer", …"""
        return nullcontext() if self._paused else _Phase(self, name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, phases are not timed: a step that is recorded takes no time of its own."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def watch_communication(self, model: nn.Module) -> None:
        """Split what is left of "backward" after the last gradient off as "communication".

        The first parameter of a network is the last to get its gradient. Where a strategy keeps gradients
        elsewhere (FSDP), its hook never runs and no communication is reported.
        """
        first = next((p for p in model.parameters() if p.requires_grad), None)
        if first is not None:
            first.register_post_accumulate_grad_hook(self._last_gradient)

    def read(self) -> dict[str, float]:
        """What happened since the last call, as metrics; empty if there was no batch.

        Seconds are means per batch: ``data_wait_s``, ``step_s``, ``time/forward_s``, …. ``images_per_s``
        counts all devices and all time, ``compute_images_per_s`` leaves the waiting for data out.
        """
        if self._running is not None:
            self._lap()
        seconds = dict(self._host)
        for name, start, end in self._pairs:
            end.synchronize()
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        # An event may stand in two pairs: backward and communication end together. It is used again once.
        self._spare += {id(event): event for _, *pair in self._pairs for event in pair}.values()
        if "communication" in seconds and "backward" in seconds:
            seconds["backward"] -= seconds["communication"]
        batches, images, wall = self._batches, self._images * self.world_size, self._wall
        self._host, self._pairs, self._batches, self._images, self._wall = {}, [], 0, 0, 0.0
        if not batches or wall <= 0:
            return {}
        data_wait = seconds.pop("data_wait", 0.0)
        record = {
            "images_per_s": images / wall,
            "data_wait_s": data_wait / batches,
            "step_s": wall / batches,
            "images_per_s_per_device": images / wall / self.world_size,
            "compute_images_per_s": images / max(wall - data_wait, 1e-9),
            "time_steps_per_s": images * self.time_steps / wall,
            "device_hours": self._hours_before + (time.perf_counter() - self._born) * self.world_size / 3600,
            **{f"time/{name}_s": value / batches for name, value in sorted(seconds.items())},
            **peak_memory(self.device),
        }
        if self.flops_per_image:
            per_device = self.flops_per_image * images / wall / self.world_size
            record["tflops_per_device"] = per_device / 1e12
            if peak := peak_flops(self.device):
                record["mfu"] = per_device / peak
        return record

    @staticmethod
    def _span(name: str) -> AbstractContextManager[Any]:
        """A stretch that is marked in the profiler's trace; nothing (it is not free) while none records."""
        return record_function(name) if profiler_enabled() else nullcontext()

    def _lap(self) -> None:
        now = time.perf_counter()
        self._wall += now - (self._running or now)
        self._running = now

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _last_gradient(self, parameter: torch.Tensor) -> None:
        if not self._paused:
            self._gradient_end = self._now()

    def _add(self, name: str, start: Any) -> None:
        end = self._now()
        self._add_pair(name, start, end)
        if name == "backward" and self._gradient_end is not None:
            self._add_pair("communication", self._gradient_end, end)
            self._gradient_end = None

    def _add_pair(self, name: str, start: Any, end: Any) -> None:
        if self._cuda:
            self._pairs.append((name, start, end))
        else:
            self._host[name] = self._host.get(name, 0.0) + end - start


class _Phase(AbstractContextManager[None]):
    """One timed phase; it is marked in a profiler's trace as well."""

    __slots__ = ("_name", "_span", "_start", "_timer")

    def __init__(self, timer: StepTimer, name: str) -> None:
        self._timer, self._name = timer, name
        self._span = timer._span(f"scalesnn: {name}")

    def __enter__(self) -> None:
        self._span.__enter__()
        self._start = self._timer._now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._timer._add(self._name, self._start)
        else:
            self._timer._gradient_end = None  # of a backward pass that broke off
        self._span.__exit__(kind, error, trace)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory in use so far, in bytes: allocated and reserved on CUDA, resident (the process)
    elsewhere.
    """
    if device.type == "cuda":
        return {
            "memory/peak_bytes": float(torch.cuda.max_memory_allocated(device)),
            "memory/reserved_bytes": float(torch.cuda.max_memory_reserved(device)),
        }
    return {"memory/peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024}
