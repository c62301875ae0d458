"""RUN/tb: scalars for TensorBoard.

RUN/tb itself has the tutorial's tags (train_acc1, train_acc5, train_loss, test_acc1, test_acc5, test_loss,
and ema_test_…) over the epoch; RUN/tb/steps has everything logged during an epoch, over the optimizer step.
They are two folders because their axes differ: on resume TensorBoard is told from which point to forget, per
folder.

The files are written here, in the caller's thread: torch's SummaryWriter writes from a thread of its own,
where a full disk ends in a traceback instead of an exception that can be handled. One record is one event,
whatever it holds.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

from scalesnn.tracking.jsonl import write_whole
from scalesnn.tracking.records import named_scalars

__all__ = ["EventFile", "TensorBoardSink"]

_FLUSH_S = 10.0
_NUMBERS = itertools.count()


class EventFile:
    """One event file in ``folder``, in TensorBoard's format.

    Args:
        folder: made if it is not there.
        purge_step: TensorBoard forgets what older files of the folder hold from this step on; None: nothing.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._file = (folder / name).open("ab", buffering=0)
        self._waiting: list[bytes] = []
        self._flushed = time.monotonic()
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add(self, values: list[Any], step: int, wall_time: float | None = None) -> None:
        """Write ``Summary.Value`` messages at a step; they reach the disk within ten seconds, or at
        ``flush``.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step=step, wall_time=wall_time or time.time(), summary=Summary(value=values))
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        waiting, self._waiting = b"".join(self._waiting), []
        self._flushed = time.monotonic()
        write_whole(self._file, waiting)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        fields.setdefault("wall_time", time.time())
        RecordWriter(_Bytes(self._waiting)).write(Event(**fields).SerializeToString())


class _Bytes:
    """What RecordWriter writes to: the records, with their lengths and checksums, as bytes in a list."""

    def __init__(self, into: list[bytes]) -> None:
        self._into = into

    def write(self, data: bytes) -> None:
        self._into.append(data)


class TensorBoardSink:
    """Write scalars to event files.

    Args:
        run_folder: the run's folder; event files go to ``run_folder/tb`` and ``run_folder/tb/steps``.
        last_step: resumed after this optimizer step; -1 for a new run. Later points of older files are
            forgotten.
        last_epoch: the last epoch whose records are kept on resume.

    Raises:
        OSError: the folder cannot be written (the tracker then switches this sink off).
    """

    name = "TensorBoard"

    def __init__(self, run_folder: Path, last_step: int = -1, last_epoch: int = -1) -> None:
        folder = run_folder / "tb"
        again = folder.exists()  # without older event files there is nothing to forget
        self._epochs = EventFile(folder, last_epoch + 1 if again else None)
        self._steps = EventFile(folder / "steps", last_step + 1 if again else None)

    def log(self, record: dict[str, Any]) -> None:
        """Write the numbers of one record."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        of_an_epoch = record.get("kind") == "epoch"
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in named_scalars(record).items()
        ]
        file = self._epochs if of_an_epoch else self._steps
        file.add(values, int(record.get("epoch" if of_an_epoch else "step", 0)), record.get("time"))
        if of_an_epoch:
            self._epochs.flush()
            self._steps.flush()

    def event(self, event: dict[str, Any]) -> None:
        """Alerts are kept as text; other events have no place among scalars."""
        if event.get("event") == "alert":
            from torch.utils.tensorboard.summary import text

            summary = text("alerts", f"**{event.get('title')}** {event.get('text')}")
            self._steps.add(list(summary.value), int(event.get("step", 0)))

    def close(self, summary: dict[str, Any]) -> list[str]:
        """Flush and close."""
        self._epochs.close()
        self._steps.close()
        return []
