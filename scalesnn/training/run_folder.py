"""Where a run lives, and whose it is: OUTPUT_DIR/RUN/ with run.json, held by RUN/lock.

run.json says what the folder is::

    {"format": "scalesnn run", "version": 1,
     "base": "exp", "number": 2,                    the folder was named exp-2, because exp was taken
     "settings": {"lr": 0.01, "epochs": 90},        those that differ from the defaults
     "starts": [{"time": …, "job": "slurm 1234", "clean": false, "resume": null, "settings": …}]}

Only folders that say so are numbered on, resumed by name or deleted by --clean; what else has a like name is
left alone. A folder appears whole: it is made under a hidden name, with run.json and the lock held, and then
renamed, so of two runs that start together one has the name and the other takes the next number.

A restart (Slurm's requeue, torchrun's --max-restarts) finds the folder in whose ``starts`` its job stands,
and goes on from the newest checkpoint there: --clean and --resume PATH are done once.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalesnn.base import UserError
from scalesnn.training.checkpoint import checkpoint_folders, find_checkpoints
from scalesnn.training.checkpoint_index import write_text_durably
from scalesnn.training.run_lock import FolderInUseError, RunLock

__all__ = ["Request", "RunFolder", "RunRecord", "look_up", "open_folder"]

RECORD = "run.json"
FORMAT = "scalesnn run"
BEGUN = "config.yaml"  # written once the training begins
RESTART_PATIENCE = 150.0  # seconds: NFS keeps the lock of a machine that was lost for a lease of 90


@dataclass(frozen=True)
class Request:
    """What is asked for: the flags that choose a folder, and the job that asks.

    Attributes:
        output_dir: the runs' parent.
        name: base name of the run.
        named: the user gave the name, with --run-name.
        resume: None, ``latest``, ``best``, or the path of a run or a checkpoint.
        clean: delete the earlier runs of this name first.
        settings: those that differ from the defaults.
        job: what a restart knows itself by; None outside of jobs.
        restart: the job was started before.
        again: the folder of ranks that start again together (``parallel.start_again``); '' where they do not.
    """

    output_dir: str
    name: str
    named: bool = False
    resume: str | None = None
    clean: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    job: str | None = None
    restart: bool = False
    again: str = ""


@dataclass
class RunFolder:
    """The chosen folder.

    Attributes:
        path: RUN.
        resume: what to load: None, ``latest`` or ``best`` of the folder itself, or a path.
        lock: held by this process; None if the folder is only looked at.
        notices: lines for the user.
    """

    path: Path
    resume: str | None = None
    lock: RunLock | None = None
    notices: list[str] = field(default_factory=list)

    def note_settings(self, settings: dict[str, Any]) -> None:
        """Keep in run.json what the run's settings turned out to be."""
        record = RunRecord.read(self.path)
        if self.lock is not None and record is not None and record.settings != settings:
            record.settings = settings
            record.write()


@dataclass
class RunRecord:
    """A folder that says that it is a run's."""

    folder: Path
    base: str
    number: int
    settings: dict[str, Any]
    starts: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Read run.json; None if there is none, or if it is not ours."""
        try:
            record = json.loads((folder / RECORD).read_bytes())
            if record["format"] != FORMAT:
                return None
            base, number = str(record["base"]), int(record["number"])
            settings, starts = dict(record["settings"]), list(record["starts"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if folder.name != numbered(base, number):  # renamed or copied: it has only the name that it bears now
            base, number, starts = folder.name, 1, []
        return cls(folder, base, number, settings, starts)

    def write(self) -> None:
        """Write run.json, whole or not at all."""
        record = {"format": FORMAT, "version": 1, "base": self.base, "number": self.number}
        record |= {"settings": self.settings, "starts": self.starts}
        write_text_durably(self.folder / RECORD, json.dumps(record, indent=1) + "\n")

    @property
    def begun(self) -> bool:
        """Whether it came to train: not refused before, nor killed."""
        return (self.folder / BEGUN).exists()

    @property
    def saved(self) -> bool:
        """Whether it holds a checkpoint."""
        return bool(checkpoint_folders(self.folder / "checkpoints"))


def open_folder(request: Request) -> RunFolder:
    """Choose, make and lock the folder of a run that is going to train; call it on one rank.

    Raises:
        FolderInUseError: the folder to resume or to clean belongs to a living process.
        UserError: the output folder cannot be written, there is no such checkpoint, or --clean would delete
            what is to be resumed.
    """
    parent = Path(request.output_dir).expanduser()
    check_writable(parent, request.output_dir)
    while True:
        records = records_below(parent)
        chosen = (
            restarted(request, records)
            or resumed(request, parent, records)
            or new_folder(request, parent, records)
        )
        if chosen is not None:  # else another process was quicker: look again
            assert chosen.lock is not None
            if chosen.lock.unsafe:
                chosen.notices.append(chosen.lock.unsafe)
            return chosen


def look_up(request: Request) -> RunFolder:
    """The folder that ``open_folder`` would choose, without making, locking or deleting anything."""
    parent = Path(request.output_dir).expanduser()
    records = records_below(parent)
    own = of_job(request, records) if request.restart else []
    if own:
        return RunFolder(own[0].folder, "latest" if own[0].saved else request.resume)
    if request.resume in ("latest", "best"):
        for record in of_name(request, records):
            if record.saved:
                return RunFolder(record.folder, request.resume)
        refuse_unrecorded(parent / request.name)
        return RunFolder(parent / request.name, notices=[nothing_to_resume(request, parent, records)])
    elif request.resume is not None:
        source = source_run(request, parent)
        if source is not None:
            return RunFolder(source.folder, request.resume)
    deleted = [r.folder for r in records if request.clean and r.base == request.name]
    records = [r for r in records if r.folder not in deleted]
    number = free_number(parent, request.name, records, deleted)
    return RunFolder(parent / numbered(request.name, number), request.resume)


# ---- the ways to a folder, in the order in which they are tried ----


def restarted(request: Request, records: list[RunRecord]) -> RunFolder | None:
    """The folder that this job has already; None on its first start."""
    own = of_job(request, records) if request.restart else []
    if request.again:
        own = [record for record in records if record.folder.resolve() == Path(request.again).resolve()]
    deadline = time.monotonic() + RESTART_PATIENCE
    while own:
        for place, record in enumerate(own):
            try:
                lock = RunLock.acquire(record.folder)
            except FolderInUseError:
                if time.monotonic() > deadline and place == len(own) - 1:
                    raise
                continue
            notices: list[str] = []
            if request.again and request.resume is not None:  # nothing has been done since
                return RunFolder(record.folder, request.resume, lock, notices)
            if not record.saved:  # it did not come to its first checkpoint: begin as it began
                resume = None if request.resume in ("latest", "best") else request.resume
                return RunFolder(record.folder, resume, lock, notices)
            if request.resume not in (None, "latest"):
                notices.append(
                    f"a restart goes on from {record.folder}: --resume {request.resume} was its start"
                )
            return RunFolder(record.folder, "latest", lock, notices)
    return None


def resumed(request: Request, parent: Path, records: list[RunRecord]) -> RunFolder | None:
    """The folder in which --resume goes on; None if it begins one."""
    if request.resume is None:
        return None
    if request.resume in ("latest", "best"):
        if request.clean:
            raise UserError(
                f"--clean deletes what --resume {request.resume} would go on from: leave one of them out"
            )
        candidates = of_name(request, records)
        for record in candidates:
            lock = RunLock.acquire(record.folder)
            if record.saved:
                return started(request, record, lock)
            lock.release()  # it ended before its first checkpoint: new_folder takes such a one
        refuse_unrecorded(parent / request.name)
        return None
    source = source_run(request, parent)
    if source is None:
        return None
    if request.clean and source.base == request.name:
        raise UserError(f"--clean deletes {source.folder}, which --resume names: leave one of them out")
    return started(request, source, RunLock.acquire(source.folder))


def new_folder(request: Request, parent: Path, records: list[RunRecord]) -> RunFolder | None:
    """A folder of its own; None if another process took its name just now."""
    notices = []
    if request.clean:
        clean(request, records)
        records = records_below(parent)
    resume = request.resume
    if resume in ("latest", "best"):
        resume, notices = None, [nothing_to_resume(request, parent, records)]
    for record in records:  # of a run that was refused or killed before it began
        if record.base == request.name and not record.begun and not record.saved:
            try:
                lock = RunLock.acquire(record.folder)
            except FolderInUseError:
                continue
            started(request, record, lock)
            return RunFolder(record.folder, resume, lock, notices)
    number = free_number(parent, request.name, records)
    target = parent / numbered(request.name, number)
    hidden = parent / f".new-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
    hidden.mkdir()
    lock = RunLock.acquire(hidden)
    RunRecord(hidden, request.name, number, request.settings, [this_start(request)]).write()
    try:
        if target.exists():
            raise FileExistsError
        hidden.rename(target)
    except OSError as error:
        lock.release()
        shutil.rmtree(hidden)
        if not target.exists():
            raise UserError(f"{target} cannot be made ({error.strerror or error})") from None
        return None
    lock.folder = target
    return RunFolder(target, resume, lock, notices)


# ---- what they are made of ----


def records_below(parent: Path) -> list[RunRecord]:
    """The runs in a folder, oldest number first."""
    if not parent.is_dir():
        return []
    folders = (p for p in parent.iterdir() if not p.name.startswith(".") and not p.is_symlink())
    found = [RunRecord.read(folder) for folder in folders if folder.is_dir()]
    return sorted((r for r in found if r is not None), key=lambda r: (r.number, r.folder.name))


def of_job(request: Request, records: list[RunRecord]) -> list[RunRecord]:
    """The runs that this job started: of those with the same settings, if any, the newest first."""

    def starts(record: RunRecord) -> list[dict[str, Any]]:
        return [s for s in record.starts if request.job is not None and s.get("job") == request.job]

    own = [r for r in reversed(records) if starts(r)]
    return [r for r in own if any(s.get("settings") == request.settings for s in starts(r))] or own


def of_name(request: Request, records: list[RunRecord]) -> list[RunRecord]:
    """The runs of a name: those with the same settings first, of these the newest. Without one, the folder
    that is called so, though as the number of another name."""
    own = [r for r in reversed(records) if r.base == request.name]
    own = own or [r for r in records if r.folder.name == request.name]
    return sorted(own, key=lambda r: (not r.saved, r.settings != request.settings))


def source_run(request: Request, parent: Path) -> RunRecord | None:
    """The run that holds the checkpoint of ``--resume PATH``, if it goes on in its folder; None if a new one
    begins with that checkpoint: it lies elsewhere, says not that it is a run, or --run-name names another.

    Raises:
        UserError: there is no such checkpoint.
    """
    checkpoint = find_checkpoints(Path(str(request.resume)))[0].resolve()
    folder = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or folder.parent != parent.resolve():
        return None
    record = RunRecord.read(parent / folder.name)
    if record is None or (request.named and request.name not in (record.base, record.folder.name)):
        return None
    return record


def started(request: Request, record: RunRecord, lock: RunLock) -> RunFolder:
    """Note in ``record``, whose lock is held, that this process goes on with it."""
    record.starts.append(this_start(request))
    record.write()
    return RunFolder(record.folder, request.resume, lock)


def this_start(request: Request) -> dict[str, Any]:
    """The entry of ``starts`` for this process."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"time": when, "job": request.job, "clean": request.clean, "resume": request.resume}
    return {**start, "settings": request.settings}


def clean(request: Request, records: list[RunRecord]) -> None:
    """Delete every run of the name; none, if one of them is in use."""
    own: list[tuple[RunRecord, RunLock]] = []
    for record in records:
        if record.base == request.name:
            try:
                own.append((record, RunLock.acquire(record.folder)))
            except FolderInUseError:
                for _, lock in own:
                    lock.release()
                raise
    for record, lock in own:
        for path in record.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (RECORD, "lock"):
                path.unlink()
        (record.folder / RECORD).unlink()  # last: until then the folder says what it is
        lock.release()  # NFS keeps the names of open files
        shutil.rmtree(record.folder)


def free_number(parent: Path, name: str, records: list[RunRecord], deleted: Sequence[Path] = ()) -> int:
    """The number after the newest run's, or the first after it whose folder does not exist, or will not."""
    number = 1 + max((r.number for r in records if r.base == name), default=0)
    while (folder := parent / numbered(name, number)).exists() and folder not in deleted:
        number += 1
    return number


def numbered(name: str, number: int) -> str:
    """``name``, ``name-2``, ``name-3`` …"""
    return name if number == 1 else f"{name}-{number}"


def refuse_unrecorded(folder: Path) -> None:
    """Raise UserError if ``folder`` holds checkpoints, but not the word that it is a run."""
    if checkpoint_folders(folder / "checkpoints") and RunRecord.read(folder) is None:
        raise UserError(
            f"{folder} has checkpoints but no {RECORD} (older versions wrote none), so it is not known "
            f"whose they are: --resume {folder} begins a new run with the newest of them"
        )


def nothing_to_resume(request: Request, parent: Path, records: list[RunRecord]) -> str:
    """The notice of a --resume latest that begins a run; it names the run that is most like it.

    Raises:
        UserError: --resume best, which only a run that was evaluated can mean.
    """
    run = parent / request.name
    text = f"--resume {request.resume}: nothing to resume in {run}"
    text += ", so this run starts fresh" if request.resume == "latest" else ""
    others = [(different(r.settings, request.settings), r.folder) for r in reversed(records) if r.saved]
    names, folder = min(others, key=lambda other: len(other[0]), default=([], None))
    if folder is not None and len(names) <= 3:
        how = f"other {', '.join(names)}" if names else "the same settings"
        text += f"; the nearest is {folder}, with {how}"
    if request.resume == "best":
        raise UserError(f"{text}; give --resume RUN, or --run-name and the run's settings")
    return text


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The settings in which two runs differ."""
    missing = object()
    return sorted(k for k in {*one, *other} if one.get(k, missing) != other.get(k, missing))


def check_writable(parent: Path, given: str) -> None:
    """Make the output folder. Raises UserError unless it can be written to."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "it, or a part of it, is a file or a link that leads nowhere"
        raise UserError(f"--output-dir {given}: cannot be written ({reason})") from None
