"""RUN/metrics.jsonl: every record, one line each, floats in full precision; and RUN/events.jsonl beside it.

metrics.jsonl holds nothing but step and epoch records. events.jsonl holds what happened at a time rather
than at a step: starts and ends of the process, notices, alerts, checkpoints.
"""

from __future__ import annotations

import errno
import json
import os
import time
from io import FileIO
from pathlib import Path
from typing import Any

from scalesnn.tracking.records import strict_json

__all__ = ["JsonlSink", "cut_records", "read_jsonl", "set_aside", "write_whole"]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file; a line that a crash left half-written is passed over. No file: no
    records.
    """
    records = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    records.append(record)
    return records


def cut_records(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Keep the records of ``path`` up to optimizer step ``last_step``, and return them.

    A run that is resumed from an earlier step than it had reached logs the steps between once more: without
    the cut they would stand there twice. The file is replaced in one move, so a crash leaves the old or the
    new one whole.
    """
    kept = [record for record in read_jsonl(path) if record.get("step", 0) <= last_step]
    if path.exists():
        beside = path.with_suffix(".jsonl.new")
        with beside.open("w", encoding="utf-8") as out:
            out.writelines(_line(record) for record in kept)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
    return kept


def set_aside(path: Path) -> None:
    """Rename ``path``, if it is there, to ``NAME.before-TIME``: a new run in an old folder starts a new
    file.
    """
    if path.exists() and path.stat().st_size:
        path.rename(path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))


def write_whole(file: FileIO, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered file.

    Raises:
        OSError: it could not be written, or only a part of it (the disk is full).
    """
    if data and file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class JsonlSink:
    """Append records to metrics.jsonl and events to events.jsonl; each line goes to the system as it is
    written.

    Args:
        run_folder: the run's folder.
        last_step: resumed after this optimizer step: later records are cut. None: a new run, and a
            metrics.jsonl that is there already is set aside.

    Raises:
        OSError: the folder cannot be written (the tracker then switches this sink off).
    """

    name = "metrics.jsonl"

    def __init__(self, run_folder: Path, last_step: int | None = None) -> None:
        if last_step is None:
            set_aside(run_folder / "metrics.jsonl")
        else:
            cut_records(run_folder / "metrics.jsonl", last_step)
        self._metrics = (run_folder / "metrics.jsonl").open("ab", buffering=0)
        self._events = (run_folder / "events.jsonl").open("ab", buffering=0)

    def log(self, record: dict[str, Any]) -> None:
        """Write one step or epoch record."""
        write_whole(self._metrics, _line(record).encode())

    def event(self, event: dict[str, Any]) -> None:
        """Write one event."""
        write_whole(self._events, _line(event).encode())

    def close(self, summary: dict[str, Any]) -> list[str]:
        """Close both files; nothing to tell the user."""
        self._metrics.close()
        self._events.close()
        return []


def _line(record: dict[str, Any]) -> str:
    return json.dumps(strict_json(record), ensure_ascii=False) + "\n"
