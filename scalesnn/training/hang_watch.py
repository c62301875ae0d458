"""A training that stands still ends itself, and leaves every rank's stack behind.

When no step ended for ``--hang-timeout`` seconds, rank 0 sends an alert through its tracker, and each rank
writes the stacks of all its threads to ``RUN/hang/rank_N.txt``; rank 0 compares them and says where the ranks
stand, and which left no stack at all (a stopped process or a dead node); then the process ends with exit code
124, and the launcher ends the rest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import time
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from scalesnn.base import UserError

__all__ = ["HangWatch", "add_hang_arguments", "describe_stacks", "short_list"]

EXIT_CODE = 124  # as timeout(1)
GRACE = (
    5.0  # seconds in which all ranks write their stacks, and the alert goes out, before the first one ends
)


def add_hang_arguments(parser: ArgumentParser) -> None:
    """Define ``--hang-timeout``."""
    parser.add_argument_group("hang watch").add_argument(
        "--hang-timeout",
        default=600.0,
        type=float,
        metavar="SECONDS",
        help="end the job, with every rank's stack in RUN/hang, when no step ends for so long (0: never)",
    )


class HangWatch:
    """Watch for steps that never end. Use as a context; call ``tick`` after every step and test batch.

    Args:
        timeout: seconds; 0 watches nothing.
        folder: of the run.
        rank, world_size: of this process.
        grace: seconds for the stacks of all ranks and the alert before the end.

    Attributes:
        alert: called with a line when the training stands still (``Tracker.stalled``), in a thread of its
            own: what makes the training stand still, a dead disk for instance, may hold it up too. It has
            ``grace`` seconds.
    """

    def __init__(
        self, timeout: float, folder: Path, rank: int, world_size: int, *, grace: float = GRACE
    ) -> None:
        if not 0 <= timeout < float("inf"):
            raise UserError(f"--hang-timeout must be 0 or more seconds, got {timeout}")
        self.timeout = timeout
        self.folder = folder / "hang"
        self.rank, self.world_size, self.grace = rank, world_size, grace
        self.alert: Callable[[str], None] = lambda text: None
        self.steps = 0
        self._last = self._armed = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> HangWatch:
        if self.timeout > 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / f"rank_{self.rank}.txt").open(
                "w", encoding="utf-8", errors="backslashreplace"
            )
            self.tick()
            self._arm()
            self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None or self._file is None:
            return
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        path = Path(self._file.name)
        with contextlib.suppress(OSError):  # the folder is not empty, or another rank has removed it
            if path.stat().st_size == 0:
                path.unlink()
            self.folder.rmdir()
        self._thread = None

    def tick(self) -> None:
        """A step has ended: the clock starts anew."""
        self.steps += 1
        self._last = time.monotonic()

    def _arm(self) -> None:
        """Set the watch of last resort; it needs no interpreter, so it fires where a thread keeps the GIL."""
        assert self._file is not None
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(self.timeout * 1.5 + 2 * self.grace, exit=True, file=self._file)

    def _watch(self) -> None:
        pause = min(1.0, self.timeout / 4)
        while not self._over.wait(pause):
            now = time.monotonic()
            if now - self._last > self.timeout:
                self._end(now - self._last)
            if now - self._armed > self.timeout / 4:
                self._arm()

    def _end(self, waited: float) -> None:
        assert self._file is not None
        text = f"no step for {waited:.0f} s after {self.steps - 1} steps; the stacks are in {self.folder}"
        alert = threading.Thread(target=self.alert, args=(text,), daemon=True)
        alert.start()
        until = time.monotonic() + self.grace
        print(
            f"rank {self.rank} of {self.world_size} on {socket.gethostname()}, process {os.getpid()}: "
            f"no step for {waited:.0f} s after {self.steps - 1} steps",
            file=self._file,
            flush=True,
        )
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        os.fsync(self._file.fileno())
        alert.join(self.grace)
        if self.world_size > 1:
            time.sleep(max(0.0, until - time.monotonic()))
        if self.rank == 0:
            lines = describe_stacks(self.folder, self.world_size)
            text = f"scalesnn: no step for {waited:.0f} s (--hang-timeout {self.timeout:g}): {self.folder}"
            print("\n  ".join([text, *lines]), file=sys.stderr, flush=True)
            time.sleep(0.2)
        else:
            time.sleep(self.grace / 2)  # rank 0 speaks before a launcher ends it for our sake
        os._exit(EXIT_CODE)


def describe_stacks(folder: Path, world_size: int) -> list[str]:
    """Where the ranks stand, one line a place, the fewest ranks first: those are the ones to look at.

    Args:
        folder: with ``rank_N.txt`` of ``faulthandler.dump_traceback``, main thread last, innermost frame
            first.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for rank in range(world_size):
        try:
            text = (folder / f"rank_{rank}.txt").read_text(encoding="utf-8")
        except OSError:
            text = ""
        # the main thread is the oldest, so its stack stands last
        main = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.M)[-1] if text else ""
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', main)
        ours = [frame for frame in frames if f"{os.sep}scalesnn{os.sep}" in frame[0]]
        if frames:
            inner, own = frames[0], (ours or frames)[0]
            where = f"{Path(own[0]).name}:{own[1]} in {own[2]}"
            if own != inner:
                where += f", inside {Path(inner[0]).name}:{inner[1]} {inner[2]}"
        else:
            where = "no stack: the process is stopped, or its node is gone"
        places[where].append(rank)
    ordered = sorted(places.items(), key=lambda item: len(item[1]))
    return [f"rank{'s' * (len(ranks) > 1)} {short_list(ranks)}: {where}" for where, ranks in ordered]


def short_list(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → ``0-2,5``."""
    parts: list[str] = []
    for number in numbers:
        first, _, last = parts[-1].partition("-") if parts else ("", "", "")
        if parts and int(last or first) == number - 1:
            parts[-1] = f"{first}-{number}"
        else:
            parts.append(str(number))
    return ",".join(parts)
