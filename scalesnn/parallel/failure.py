"""A rank that dies takes the job with it, and every rank says which one it was.

Collectives only tell that somebody is gone, if they tell anything. So each rank writes who it is, and a
sign of life every few seconds, to the store through which the ranks met. When a rank fails it leaves its
exception there; when one is killed, the others on its machine see that its process is gone, and rank 0 sees
its signs of life stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from scalesnn.base import UserError

__all__ = ["FailureWatch"]

PREFIX = "scalesnn/failure/"
EXIT_CODE = 1


class FailureWatch:
    """Watches over the ranks of a job from a thread of its own.

    Args:
        store: through which the ranks met; a connection of its own is made.
        rank, world_size: of this process.
        patience: seconds without a sign of life after which a rank counts as gone.
        tick: seconds between looks.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, patience: float = 40.0, tick: float = 2.0
    ) -> None:
        own: Any = store.clone() if hasattr(store, "clone") else store
        own.set_timeout(timedelta(seconds=patience / 2))
        self.store = dist.PrefixStore(PREFIX, own)
        self.rank, self.world_size, self.patience, self.tick = rank, world_size, patience, tick
        self.stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._previous_hook = sys.excepthook
        self._places: list[dict[str, Any]] = []

    def start(self) -> None:
        """Begin to watch; collective."""
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        self.store.set(f"place/{self.rank}", json.dumps(me))
        self._places = [json.loads(self.store.get(f"place/{rank}")) for rank in range(self.world_size)]
        self._previous_hook = sys.excepthook
        sys.excepthook = self._on_exception
        self._thread = threading.Thread(target=self._run, name="failure watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: the job is coming to its end."""
        self.stopped.set()
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._previous_hook
        if self._thread is not None:
            self._thread.join(timeout=self.tick + 1)

    # ---- what went wrong ----

    def announce(self, text: str) -> None:
        """Leave word of this rank's failure, unless another was first."""
        self.store.compare_set("failed", "", json.dumps({"rank": self.rank, "text": text}))

    def culprit(self) -> dict[str, Any] | None:
        """The first failure: {"rank", "text"}; None where there is none."""
        if not self.store.check(["failed"]):
            return None
        found = json.loads(self.store.get("failed"))
        return dict(found) if found else None

    def gone(self) -> int | None:
        """A rank on this machine whose process does not exist any more; None where all do."""
        for rank, place in enumerate(self._places):
            if place["host"] == socket.gethostname() and not is_alive(place["pid"]):
                return rank
        return None

    def _where(self, rank: int) -> str:
        place = self._places[rank]
        return f"rank {rank} (host {place['host']}, process {place['pid']})"

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Uncaught exceptions: the first one gets its traceback, those that follow from it one line."""
        if self.stopped.is_set() or issubclass(kind, KeyboardInterrupt):
            self._previous_hook(kind, error, trace)
            return
        lost = is_lost_connection(error)
        if lost:
            self._wait_for_culprit()
        try:
            first = self.culprit()
        except RuntimeError:  # the store's keeper is gone
            first = {"rank": 0, "text": f"{self._where(0)} is gone, and the store with it"}
        if lost and first is not None and first["rank"] != self.rank:
            say(f"rank {self.rank} stops, because {first['text']}")
            self.stopped.set()
            return
        reason = "".join(traceback.format_exception_only(kind, error)).strip().splitlines()
        with contextlib.suppress(RuntimeError):
            self.announce(f"{self._where(self.rank)} failed: {reason[0] if reason else kind.__name__}")
        self.stopped.set()
        self._previous_hook(kind, error, trace)
        say(f"{self._where(self.rank)} failed: {reason[0] if reason else kind.__name__}")

    def _wait_for_culprit(self) -> None:
        """A connection broke: find out who is at its other end."""
        deadline = time.monotonic() + self.patience + 2 * self.tick
        while time.monotonic() < deadline:
            try:
                if self.culprit() is not None:
                    return
                lost = self.gone()
                if lost is not None:
                    self._announce_gone(lost)
                    return
            except RuntimeError:
                return
            time.sleep(0.2)

    def _announce_gone(self, rank: int) -> None:
        # A rank that failed by an exception says so before it goes; give that word a moment to arrive.
        time.sleep(0.5)
        text = f"{self._where(rank)} is gone: it was killed, or its machine ran out of memory"
        self.store.compare_set("failed", "", json.dumps({"rank": rank, "text": text}))

    # ---- the thread ----

    def _run(self) -> None:
        seen = {rank: (-1, time.monotonic()) for rank in range(self.world_size)}
        beat = 0
        reached = time.monotonic()
        while not self.stopped.wait(self.tick):
            try:
                beat += 1
                self.store.set(f"beat/{self.rank}", str(beat))
                lost = self.gone()
                if lost is not None:
                    self._announce_gone(lost)
                if self.rank == 0:
                    self._look_for_silence(seen)
                first = self.culprit()
                reached = time.monotonic()
            except RuntimeError:
                if self.stopped.is_set() or time.monotonic() - reached < self.patience / 2:
                    continue
                first = {"rank": 0, "text": f"{self._where(0)}, which keeps the store, is gone"}
            if first is not None and first["rank"] != self.rank and not self.stopped.is_set():
                self._leave(first["text"])

    def _look_for_silence(self, seen: dict[int, tuple[int, float]]) -> None:
        now = time.monotonic()
        for rank in range(1, self.world_size):
            key = f"beat/{rank}"
            count = int(self.store.get(key)) if self.store.check([key]) else -1
            if count != seen[rank][0]:
                seen[rank] = (count, now)
            elif now - seen[rank][1] > self.patience:
                text = f"{self._where(rank)} has given no sign of life for {self.patience:.0f} s"
                self.store.compare_set("failed", "", json.dumps({"rank": rank, "text": text}))

    def _leave(self, text: str) -> None:
        """End this process, after the main thread had its chance to."""
        if self.stopped.wait(5 * self.tick):
            return
        say(f"rank {self.rank} stops, because {text}")
        sys.stdout.flush()
        os._exit(EXIT_CODE)


def is_alive(pid: int) -> bool:
    """Whether a process exists on this machine and still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that another rank, not this one, is in trouble."""
    if isinstance(error, UserError):
        return False
    while error is not None:
        if isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
            return True
        text = str(error).lower()
        if any(word in text for word in ("connection closed by peer", "connection reset", "broken pipe")):
            return True
        if "gloo" in text or "nccl" in text:
            return True
        if error.__cause__ is None:
            break
        error = error.__cause__
    return False


def say(text: str) -> None:
    """One line on standard error."""
    print(f"scalesnn: {text}", file=sys.stderr, flush=True)
