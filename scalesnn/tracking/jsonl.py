"""RUN/metrics.jsonl: every record, one line each, floats in full precision; and RUN/events.jsonl beside it.

metrics.jsonl holds nothing but step and epoch records. events.jsonl holds what happened at a time rather
than at a step: starts and ends of the process, notices, alerts, checkpoints.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Any

from scalesnn.tracking.records import strict_json

__all__ = ["JsonlSink", "cut_records", "read_jsonl", "set_aside"]


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


class JsonlSink:
    """Append records to metrics.jsonl and events to events.jsonl; every line is flushed as it is written.

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
        self._metrics: IO[str] = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events: IO[str] = (run_folder / "events.jsonl").open("a", encoding="utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """Write one step or epoch record."""
        self._metrics.write(_line(record))
        self._metrics.flush()

    def event(self, event: dict[str, Any]) -> None:
        """Write one event."""
        self._events.write(_line(event))
        self._events.flush()

    def close(self, summary: dict[str, Any]) -> list[str]:
        """Close both files; nothing to tell the user."""
        self._metrics.close()
        self._events.close()
        return []


def _line(record: dict[str, Any]) -> str:
    return json.dumps(strict_json(record), ensure_ascii=False) + "\n"
