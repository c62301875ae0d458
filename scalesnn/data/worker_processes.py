"""Worker processes of a torch DataLoader that end a run at once, with the cause, when they cannot go on.

A worker hands its batches over in shared memory, from a thread. Where that fails (a full /dev/shm, too few
open files), Python prints a traceback in the worker and drops the batch, and the training waits for it for
ever. Here the worker ends instead. torch notices the death of a worker while it waits for a batch, within
five seconds.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader

from scalesnn.base import UserError

__all__ = ["batches_of_workers", "init_worker"]

_LOST = 3  # exit code of a worker that could not hand over a batch


def init_worker(worker: int) -> None:
    """Set up a worker process (``worker_init_fn``).

    Signals to a whole job are left to the training: it saves first, and needs its loader for that.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    setattr(Queue, "_on_queue_feeder_error", staticmethod(_end))  # noqa: B010  # Python's hook for this case


def _end(error: BaseException, batch: object) -> None:
    print(f"scalesnn: a data worker cannot hand over its batch: {error}", file=sys.stderr, flush=True)
    os._exit(_LOST)


def batches_of_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of ``loader``.

    Raises:
        UserError: a worker process died, or its batch cannot be taken over.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    results: Any = None
    try:
        results = iter(loader)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # torch's own would raise anywhere in the training, amid the writing of a checkpoint too
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        while True:
            try:
                batch = next(results)
            except StopIteration:
                return
            yield batch
    except Exception as error:
        for worker in getattr(results, "_workers", []):
            worker.kill()  # it may wait for a lock that a dead one held, and SIGTERM is blocked there
        if not loader.num_workers or not _is_about_workers(error):
            raise
        raise UserError(
            _what_to_do(str(error).split("\n")[0] or type(error).__name__, loader.num_workers)
        ) from error


def _is_about_workers(error: Exception) -> bool:
    """Whether an error comes from handing over a batch; what a data set raises in a worker is "Caught … in
    DataLoader worker process 0"."""
    if isinstance(error, (OSError, EOFError)):
        return not str(error).startswith("Caught ")
    known = ("DataLoader worker (pid", "shared memory", "ancdata")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in known)


def _what_to_do(cause: str, workers: int) -> str:
    room = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    shared = f"{room.free / 2**20:.1f} of {room.total / 2**20:.1f} MiB" if room else "an unknown part"
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"a data worker process died or cannot hand over its batches ({cause}). {shared} of /dev/shm are "
        f"free, {files} files may be open. Give the job more shared memory (docker --shm-size=8g) or memory, "
        f"raise `ulimit -n`, or lower --workers (now {workers}; 0 needs no shared memory); --loader dali has "
        "no worker processes"
    )
