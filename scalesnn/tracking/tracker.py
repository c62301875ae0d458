"""One interface for all logging: the training loop talks to a Tracker, the Tracker to its sinks.

    loop ──▶ Tracker ──▶ console        (progress, table, notices)
                    ├──▶ metrics.jsonl  (everything, in full precision)
                    ├──▶ TensorBoard
                    └──▶ W&B

Only rank 0 has a Tracker; the others have a NullTracker, so the loop needs no conditions. Tracking never
ends a run: a sink that fails is switched off with one notice.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from scalesnn.tracking.console import ConsoleSink
from scalesnn.tracking.jsonl import JsonlSink, read_jsonl
from scalesnn.tracking.records import plain
from scalesnn.tracking.tensorboard import TensorBoardSink
from scalesnn.tracking.wandb_sink import WandbOptions, WandbSink

__all__ = ["NullTracker", "Sink", "Tracker", "create_tracker"]

Record = dict[str, Any]


class Sink(Protocol):
    """Where records go. Any method may raise: the tracker then drops the sink."""

    name: str

    def log(self, record: Record) -> None:
        """Take one step or epoch record."""

    def event(self, event: Record) -> None:
        """Take one event: ``event`` is its kind ("start", "notice", "alert", "checkpoint", "end")."""

    def close(self, summary: Record) -> list[str]:
        """Finish, and return lines that the user should read last."""


class NullTracker:
    """A tracker that keeps nothing: for ranks other than 0."""

    def log_step(self, record: Record) -> None:
        """Do nothing."""

    def log_epoch(self, record: Record) -> None:
        """Do nothing."""

    def progress(self, record: Record) -> None:
        """Do nothing."""

    def notice(self, text: str) -> None:
        """Do nothing."""

    def alert(self, title: str, text: str) -> None:
        """Do nothing."""

    def stalled(self, text: str) -> None:
        """Do nothing."""

    def log_checkpoint(self, path: Path, *, best: bool = False, seconds: float | None = None) -> None:
        """Do nothing."""

    def last(self, name: str) -> float:
        """0: there is no record."""
        return 0.0

    def close(self, summary: Record | None = None) -> None:
        """Do nothing."""


class Tracker(NullTracker):
    """Hand records to all sinks.

    Args:
        total_steps: optimizer steps of the whole run, for the time left; 0: unknown.
        first_step: steps already done when this process started.
        seen: (split, step) of epoch records that are already on file: a repeated one is dropped.
        newest: the newest step record on file.
    """

    def __init__(
        self,
        *,
        total_steps: int = 0,
        first_step: int = 0,
        seen: set[tuple[str, int]] | None = None,
        newest: Record | None = None,
    ) -> None:
        self._sinks: list[Sink] = []
        self._total_steps = total_steps
        self._first_step = self._step = first_step
        self._seen = seen or set()
        self._clock: tuple[float, int] | None = None
        self._closed = False
        self._newest: Record = dict(newest or {})
        self._pending: Record = {}
        self._waiting: SimpleQueue[str] = SimpleQueue()  # lines for the user, from the sinks' threads

    def add_sink(self, name: str, make: Callable[[], Sink]) -> None:
        """Open a sink with ``make``; one that cannot be opened is left out, with a notice."""
        try:
            self._sinks.append(make())
        except Exception as error:
            self._say_off(name, error)

    def notify_later(self, text: str) -> None:
        """A notice from any thread: it is shown when the training loop next calls the tracker."""
        self._waiting.put(text)

    def log_step(self, record: Record) -> None:
        """Log the record of the last steps: ``step``, ``epoch``, ``split`` ("train" unless given), and
        metrics.
        """
        self._newest = {"kind": "step", "split": "train", **plain(record), **self._pending}
        self._pending = {}
        self._log(self._newest)

    def log_epoch(self, record: Record) -> None:
        """Log one pass over a split: ``step``, ``epoch``, ``split`` (train, test or ema_test), and metrics.

        A record of a split and step that is already on file (a resumed run that evaluates the same weights
        again) is not logged twice.
        """
        record = {"kind": "epoch", "split": "train", **plain(record)}
        key = (str(record["split"]), int(record.get("step", self._step)))
        if key not in self._seen:
            self._seen.add(key)
            self._log(record)

    def progress(self, record: Record) -> None:
        """Show where the run is; call it every step, it is cheap. The time left is added.

        A tensor is read back only when the line is really drawn, so the device is not waited for at every
        step.
        """
        self._say_waiting()
        record = {**record, "total_steps": record.get("total_steps", self._total_steps)}
        for name in ("lr", "images_per_s"):  # not measured every step
            if name in self._newest:
                record.setdefault(name, self._newest[name])
        self._step = int(record.get("step", self._step))
        for sink in [sink for sink in self._sinks if isinstance(sink, ConsoleSink)]:
            if sink.is_due(record):
                line = plain(record)
                line.setdefault("time_left_s", self.time_left_s(self._step))
                self._safely(sink, partial(sink.progress, line))

    def time_left_s(self, step: int) -> float | None:
        """Seconds to the last step at the pace of this process so far; None while unknown.

        The first step of a process (compilation, warm-up) is not counted.
        """
        now = time.monotonic()
        if self._clock is None or step < self._clock[1]:
            self._clock = (now, step)
        since, from_step = self._clock
        if step <= from_step or not self._total_steps:
            return None
        return max(0, self._total_steps - step) * (now - since) / (step - from_step)

    def notice(self, text: str) -> None:
        """Tell the user one line."""
        if self._closed and not self._sinks:
            print(f"scalesnn: {text}", flush=True)
        self._event({"event": "notice", "text": text})

    def alert(self, title: str, text: str) -> None:
        """Tell the user of trouble (NaN, a stall, dead layers), through W&B's alerts as well."""
        self._event({"event": "alert", "title": title, "text": text})

    def stalled(self, text: str) -> None:
        """The training stands still, and its process is about to end: alert, and close every sink (an offline
        W&B run reaches the disk only then). For the hang watch's thread.
        """
        self.alert("the training stands still", text)
        self.close({"state": "failed"})

    def log_checkpoint(self, path: Path, *, best: bool = False, seconds: float | None = None) -> None:
        """Note a checkpoint; with --wandb-log-model it becomes a W&B artifact. How long it took to write is
        part of the next step record.
        """
        self._event({"event": "checkpoint", "path": str(path), "best": best, "seconds": seconds})
        if seconds is not None:
            self._pending["checkpoint_s"] = seconds

    def last(self, name: str) -> float:
        """The newest value of a number in the step records, those of earlier processes included; 0: there is
        none.
        """
        return float(self._newest.get(name, 0.0))

    def close(self, summary: Record | None = None) -> None:
        """Close every sink; ``summary`` is printed and kept. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self._say_waiting()
        summary = plain(summary or {})
        self._event({"event": "end", "summary": summary})
        last_lines: list[str] = []
        for sink in reversed(list(self._sinks)):  # the console last: it shows what the others have to say
            self._safely(sink, partial(_close, sink, summary, last_lines))
            if sink in self._sinks:
                self._sinks.remove(sink)
            self._say_waiting()
        for line in last_lines:
            print(f"scalesnn: {line}", flush=True)

    def _say_waiting(self) -> None:
        while not self._waiting.empty():
            self.notice(self._waiting.get())

    def _log(self, record: Record) -> None:
        record.setdefault("time", time.time())
        self._step = max(self._step, int(record.get("step", 0)))
        for sink in list(self._sinks):
            self._safely(sink, partial(sink.log, record))

    def _event(self, event: Record) -> None:
        event = {**event, "step": self._step, "time": time.time()}
        for sink in list(self._sinks):
            self._safely(sink, partial(sink.event, event))

    def _safely(self, sink: Sink, action: Callable[[], Any]) -> None:
        """Run ``action``; if it fails, drop the sink and say so once. Nothing that a sink does may end the
        run.
        """
        if sink not in self._sinks:
            return
        try:
            action()
        except Exception as error:
            self._sinks.remove(sink)
            self._say_off(sink.name, error)

    def _say_off(self, name: str, error: Exception) -> None:
        text = f"{name} is switched off for the rest of this run ({_reason(error)}); training goes on"
        if any(isinstance(sink, ConsoleSink) for sink in self._sinks):
            self.notice(text)
        else:
            print(f"scalesnn: {text}", file=sys.stderr, flush=True)


def create_tracker(
    args: argparse.Namespace,
    run_folder: Path,
    config: Record,
    *,
    resumed: bool = False,
    total_steps: int = 0,
    first_step: int = 0,
) -> Tracker:
    """The tracker of rank 0, with every sink that can be opened.

    Args:
        args: the resolved command line (flags of ``add_tracking_arguments``).
        run_folder: the run's folder; it exists.
        config: every resolved setting, for W&B's config.
        resumed: this process continues a run of ``run_folder``.
        total_steps: optimizer steps of the whole run.
        first_step: optimizer steps already done, when resumed: records of later steps, left by the process
            before, are cut, so that the step axis has neither gap nor repeat.
    """
    metrics = run_folder / "metrics.jsonl"
    kept = (
        [record for record in read_jsonl(metrics) if record.get("step", 0) <= first_step] if resumed else []
    )
    epochs = [record for record in kept if record.get("kind") == "epoch"]
    newest = next((record for record in reversed(kept) if record.get("kind") == "step"), None)
    tracker = Tracker(
        total_steps=total_steps,
        first_step=first_step,
        seen={(str(record.get("split")), int(record.get("step", 0))) for record in epochs},
        newest=newest,
    )
    tracker.add_sink("console", ConsoleSink)
    tracker.add_sink("metrics.jsonl", lambda: JsonlSink(run_folder, first_step if resumed else None))
    last_epoch = max((int(record.get("epoch", -1)) for record in epochs), default=-1)
    last_step = first_step if resumed else -1
    tracker.add_sink("TensorBoard", lambda: TensorBoardSink(run_folder, last_step, last_epoch))
    if args.wandb != "disabled":
        options = WandbOptions(
            mode=args.wandb,
            project=args.wandb_project,
            entity=args.wandb_entity,
            name=args.wandb_name,
            group=args.wandb_group,
            tags=tuple(args.wandb_tags),
            notes=args.wandb_notes,
            log_model=args.wandb_log_model,
            config=plain(config),
        )
        notify = tracker.notify_later
        tracker.add_sink(
            "W&B", lambda: WandbSink(run_folder, options, history=kept, resumed=resumed, notify=notify)
        )
    tracker._event(
        {"event": "start", "resumed": resumed, "first_step": first_step, "total_steps": total_steps}
    )
    return tracker


def _close(sink: Sink, summary: Record, last_lines: list[str]) -> None:
    last_lines.extend(sink.close(summary))


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed: pip install {error.name}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
