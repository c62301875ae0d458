"""All ranks start again together, with what one of them found that it needs.

A rank that runs out of memory in a backward pass leaves behind a reducer and collectives that nobody can
finish; other ranks may be waiting in them for ever. So nothing is mended. The ranks agree through the store
(on the CPU, because by then GPUs wait for each other), and each replaces its process by a new one with the
command line and the environment of its start: a new process group and an empty GPU. Process ids stay the
same, so no launcher notices. This is for the first steps of a run: only they are done again, and a checkpoint
that was resumed is resumed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

__all__ = ["Again", "StartAgain", "StartTogether", "again", "remember_start"]

VARIABLE = "SCALESNN_START_AGAIN"
PREFIX = "scalesnn/again/"
TICK_S = 2.0  # between looks of the thread: each is a call to the store, of every rank
OTHERS_S = 90.0  # that rank 0 waits for the others to be ready

_start: tuple[dict[str, str], set[int]] | None = None


@dataclass(frozen=True)
class Again:
    """What a process that was started again is told.

    Attributes:
        count: how often the ranks have started again.
        policy: of activation checkpointing.
        folder: of the run; '' where there was none yet.
        said: why, in one line.
    """

    count: int
    policy: str
    folder: str
    said: str


def again(environ: Mapping[str, str] = os.environ) -> Again | None:
    """What this process is told, if it was started again."""
    text = environ.get(VARIABLE)
    return Again(**json.loads(text)) if text else None


def remember_start() -> None:
    """Keep the environment and the processor cores of this process, for a start like this one; call it before
    they are changed."""
    global _start
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    _start = dict(os.environ), cores


class StartAgain(SystemExit):
    """Ends the main thread's work; whoever catches it last calls ``execute``."""

    def __init__(self, together: StartTogether) -> None:
        super().__init__(75)
        self.together = together

    def execute(self) -> None:
        """Replace this process; does not return."""
        self.together.replace_process()


class StartTogether:
    """Agrees with the other ranks on a start with another policy.

    A thread watches over a main thread that cannot take part, because it is stuck in a collective: it
    replaces the process for it.

    Args:
        store: through which the ranks met.
        rank, world_size: of this process.
        announce: tells the other ranks why this one fails.
        grace: seconds that the main thread has to leave by itself.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        announce: Callable[[str], None] = lambda text: None,
        grace: float = 10.0,
    ) -> None:
        self.announce = announce
        self.rank, self.world_size, self.grace = rank, world_size, grace
        self.folder = ""
        # Two connections: a call that waits holds its connection.
        self._store, self._store_of_thread = (_own(store) for _ in range(2))
        self._decided: tuple[str, str] | None = None
        self._round = 0
        self._over, self._leaving, self._replacing = threading.Event(), threading.Event(), threading.Lock()
        threading.Thread(target=self._watch, name="start again", daemon=True).start()

    def agree(self, policy: str | None, said: str = "") -> str | None:
        """Every rank calls it after an attempt that has ended, whatever has come of it.

        Args:
            policy: the policy with which to start again; None where the attempt went well.
            said: why.

        Returns:
            the policy with which all ranks start again; None where it went well on all.
        """
        self._round += 1
        if policy is not None:
            self._store.compare_set("policy", "", json.dumps([policy, said]))
            self._store.set(f"round/{self._round}", "again")
        elif self._store.add(f"well/{self._round}", 1) == self.world_size:
            self._store.set(f"round/{self._round}", "well")
        while self.pending() is None:
            try:
                self._store.wait([f"round/{self._round}"], timedelta(seconds=5))
            except RuntimeError:
                time.sleep(0.1)  # another rank still computes, or compiles
                continue
            if self.pending() is None:
                return None
        return self.pending()

    def pending(self) -> str | None:
        """The policy with which the ranks start again, if that has been decided."""
        if self._decided is None:
            self._look(self._store)
        return None if self._decided is None else self._decided[0]

    def start_again(self) -> StartAgain:
        """The exception that takes the main thread out of its work."""
        self._leaving.set()
        return StartAgain(self)

    def stop(self) -> None:
        """The first steps are over: nobody starts again any more."""
        self._over.set()

    def _look(self, store: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the store's keeper is gone: the failure watch says so
            if store.check(["policy"]):
                policy, said = json.loads(store.get("policy"))
                self._decided = policy, said

    def _watch(self) -> None:
        while self._decided is None:
            if self._over.wait(TICK_S):
                return
            self._look(self._store_of_thread)
        if self._leaving.wait(self.grace):
            time.sleep(6 * self.grace)  # for it to close its files and its metrics
        self.replace_process(forced=True)

    def replace_process(self, forced: bool = False) -> None:
        """Wait until all ranks are ready for it, and replace this process; does not return.

        Args:
            forced: the main thread is stuck, and its child processes are still there.
        """
        self._replacing.acquire()
        store = self._store_of_thread if forced else self._store
        with contextlib.suppress(RuntimeError):
            ready = store.add("ready", 1)
            if self.rank == 0:  # which may keep the store: it goes last
                end = time.monotonic() + OTHERS_S
                while ready < self.world_size and time.monotonic() < end:
                    time.sleep(0.05)
                    ready = store.add("ready", 0)
                store.set("go", "1")
            else:
                store.wait(["go"], timedelta(seconds=OTHERS_S + 30))
        assert _start is not None, "remember_start() was not called"
        assert self._decided is not None
        before, (environment, cores) = again(), _start
        told = Again(before.count + 1 if before else 1, self._decided[0], self.folder, self._decided[1])
        if forced:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        if cores:
            os.sched_setaffinity(0, cores)
        sys.stdout.flush()
        sys.stderr.flush()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if int(name) > 2:
                    os.set_inheritable(int(name), False)  # sockets, and the GPU's devices
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**environment, VARIABLE: json.dumps(asdict(told))},
        )


def _own(store: dist.Store) -> Any:
    """A connection of one's own to the store of the ranks."""
    own: Any = store.clone() if hasattr(store, "clone") else store
    return dist.PrefixStore(PREFIX, own)
