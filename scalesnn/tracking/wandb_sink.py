"""Weights & Biases: one run per job, one id for its life, online where possible and offline by itself.

The trap. Every process of a resumed offline run leaves its own ``offline-run-…`` folder with the same id. Up
to wandb 0.30, ``wandb sync`` uploads each from line 0, and the last one overwrites the others (wandb issues
2423, 3841, 4624); from 0.31 on it appends them, and the steps between the checkpoint and the crash are there
twice. The way out. metrics.jsonl is the record of a run, already cut at the step it resumed from. A resumed
offline run therefore begins its new folder with everything in metrics.jsonl that is not uploaded yet, and
the older folders move to ``wandb_replaced``: at any time one folder has all there is to upload. Online, the
server says up to which step it has the run, and only later records are sent.

All calls into wandb are made by one thread of our own with a bounded queue, so that neither a slow start, a
dead network nor a slow disk is ever waited for by a training step.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scalesnn.tracking.records import named_scalars
from scalesnn.tracking.wandb_log import read_history

__all__ = ["WandbOptions", "WandbSink", "run_id_of", "sync_command", "write_offline_run"]

_QUEUE_LENGTH = 20_000
_SERVICE_IS_GONE = ("HandleAbandonedError", "MailboxClosedError")  # of wandb.sdk.mailbox
WAIT_S = 60.0  # how long the end of a run waits for the upload
_BEST = {
    "train_acc1": "max",
    "train_acc5": "max",
    "train_loss": "min",
    "test_acc1": "max",
    "test_acc5": "max",
    "test_loss": "min",
    "ema_test_acc1": "max",
    "ema_test_acc5": "max",
    "ema_test_loss": "min",
}


@dataclass
class WandbOptions:
    """What the command line says about W&B (see ``add_tracking_arguments``), and the run's settings."""

    mode: str = "offline"
    project: str = "scalesnn"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    log_model: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def run_id_of(run_folder: Path) -> str:
    """The W&B id of a run folder: kept in ``wandb_run_id``, made on first use (a sweep agent's id is
    taken).
    """
    kept = run_folder / "wandb_run_id"
    if kept.exists() and (run_id := kept.read_text(encoding="utf-8").strip()):
        return run_id
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    kept.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def sync_command(wandb_folder: Path) -> str:
    """The line that uploads an offline run."""
    return f"wandb sync {wandb_folder}"


class WandbSink:
    """Send records to W&B from a thread of its own.

    Args:
        run_folder: the run's folder; wandb writes below ``run_folder/wandb``.
        options: mode, names, config.
        history: records of the steps before this process, in order (metrics.jsonl after its cut).
        resumed: this process continues the run.
        notify: called with a line for the user, from the sink's thread.
        wait_s: how long ``close`` waits for the upload or the file; ``WAIT_S`` unless given.
    """

    name = "W&B"

    def __init__(
        self,
        run_folder: Path,
        options: WandbOptions,
        *,
        history: Iterable[dict[str, Any]] = (),
        resumed: bool = False,
        notify: Callable[[str], None] = lambda text: None,
        wait_s: float | None = None,
    ) -> None:
        self._run_folder = run_folder
        self._options = options
        self._history = list(history)
        self._resumed = resumed
        self._notify = notify
        self._wait_s = WAIT_S if wait_s is None else wait_s
        self._id = run_id_of(run_folder)
        self._queue: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue(_QUEUE_LENGTH)
        self._error: Exception | None = None
        self._last_lines: list[str] = []
        self._known_step = -1  # the server has the run up to this step
        self._run: Any = None
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Queue one record.

        Raises:
            RuntimeError: wandb failed earlier, or the queue is full (the tracker then drops this sink).
        """
        self._put("log", record)

    def event(self, event: dict[str, Any]) -> None:
        """Queue an event: alerts become W&B alerts, checkpoints artifacts (with --wandb-log-model)."""
        if event.get("event") in ("alert", "checkpoint"):
            self._put(str(event["event"]), event)

    def close(self, summary: dict[str, Any]) -> list[str]:
        """Finish the run, and return the line that uploads what is not uploaded."""
        self._put("close", summary)
        self._thread.join(self._wait_s)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            return [
                f"W&B did not take everything within {self._wait_s:.0f} s. All of it is in metrics.jsonl; "
                f"make an uploadable run of it with: {sys.executable} -m scalesnn.tracking.wandb_sink "
                f"{self._run_folder}"
            ]
        return self._last_lines

    def _put(self, what: str, data: dict[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._queue.put_nowait((what, data))
        except queue.Full:
            raise RuntimeError(f"it is {_QUEUE_LENGTH} records behind") from None

    def _work(self) -> None:
        try:
            what, data = self._queue.get()  # wandb takes a second to load: the first step goes before it
            self._run = self._start()
            self._send_history()
            while what != "close":
                getattr(self, f"_{what}")(data)
                what, data = self._queue.get()
            self._finish(data)
        except Exception as error:
            self._error = error
            if isinstance(error, ConnectionError) or type(error).__name__ in _SERVICE_IS_GONE:
                self._error = RuntimeError(
                    "its service process has ended, as after a signal to the whole job; metrics.jsonl has "
                    "everything, and a resumed run hands it on"
                )
                _leave_service()

    def _start(self) -> Any:
        """The wandb run: online where asked for and possible, else offline with one notice."""
        import wandb

        reason = ""
        if self._options.mode == "online":
            reason = _why_offline(wandb)
            if not reason:
                try:
                    return self._init(wandb, "online")
                except Exception as error:
                    reason = f"wandb.init failed ({_first_line(error)})"
        self._known_step = self._uploaded_step() if self._resumed else -1
        run = self._init(wandb, "offline")
        if reason:
            self._notify(f"W&B is offline: {reason}")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        known = wandb.Settings.model_fields
        wanted = {
            "silent": True,
            "console": "off",
            "init_timeout": 30.0,
            "finish_timeout": self._wait_s,
            "x_save_requirements": False,
            "disable_job_creation": True,
        }
        options = self._options
        run = wandb.init(
            mode=mode,
            dir=str(self._run_folder),
            id=self._id,
            resume="allow" if self._resumed and (mode == "online" or self._known_step >= 0) else None,
            project=options.project,
            entity=options.entity,
            name=options.name or self._run_folder.name,
            group=options.group,
            tags=list(options.tags) or None,
            notes=options.notes,
            config=options.config,
            reinit="create_new",
            settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
        )
        for axis in ("step", "epoch", "images_seen"):
            run.define_metric(axis)
        run.define_metric("*", step_metric="step")
        for name, best in _BEST.items():
            run.define_metric(name, step_metric="step", summary=f"{best},last")
        return run

    def _send_history(self) -> None:
        """Bring the run up to the step this process starts from."""
        if self._resumed and not self._run.offline:
            self._known_step = int(self._run.summary.get("step", -1))
        for record in self._history:
            self._log(record)
        self._history = []
        if self._run.offline:
            self._set_older_folders_aside()

    def _uploaded_step(self) -> int:
        """The last step in what earlier processes uploaded, -1 for nothing: folders of online runs and
        folders that ``wandb sync`` has marked.
        """
        folder = self._run_folder / "wandb"
        files = [*folder.glob(f"run-*-{self._id}/*.wandb")]
        files += [file for file in folder.glob(f"offline-run-*-{self._id}/*.wandb") if _is_synced(file)]
        return max((int(row.get("step", -1)) for file in files for row in read_history(file)), default=-1)

    def _set_older_folders_aside(self) -> None:
        current = _folder(self._run)
        for older in (self._run_folder / "wandb").glob(f"offline-run-*-{self._id}"):
            if older.resolve() != current.resolve() and not any(map(_is_synced, older.glob("*.wandb"))):
                aside = self._run_folder / "wandb_replaced"
                aside.mkdir(exist_ok=True)
                shutil.move(str(older), str(aside / f"{older.name}-{time.time_ns()}"))

    def _log(self, record: dict[str, Any]) -> None:
        step = int(record.get("step", 0))
        if step <= self._known_step:
            return
        row: dict[str, Any] = {**named_scalars(record), "step": step}
        for axis in ("epoch", "images_seen"):
            if axis in record:
                row[axis] = record[axis]
        if "time" in record:
            row["_timestamp"] = record["time"]
        self._run.log(row)

    def _alert(self, event: dict[str, Any]) -> None:
        self._run.alert(title=event["title"], text=event["text"], level="WARN", wait_duration=300)

    def _checkpoint(self, event: dict[str, Any]) -> None:
        if not self._options.log_model:
            return
        import wandb

        path = Path(event["path"])
        name = re.sub(r"[^\w.-]", "-", f"{self._run_folder.name}-checkpoint")
        artifact = wandb.Artifact(name, type="model", metadata={"step": event.get("step")})
        try:
            if path.is_dir():
                artifact.add_dir(str(path))
            else:
                artifact.add_file(str(path))
        except (OSError, ValueError) as error:  # a later checkpoint has replaced it by now
            self._notify(f"W&B: {path.name} is no artifact ({_first_line(error)})")
            return
        self._run.log_artifact(artifact, aliases=["latest", *(["best"] if event.get("best") else [])])

    def _finish(self, summary: dict[str, Any]) -> None:
        run = self._run
        for key, value in summary.items():
            run.summary[key] = value
        if summary.get("state") == "preempted" and not run.offline:
            run.mark_preempting()
        folder, offline, url = _folder(run), run.offline, None if run.offline else run.url
        well = summary.get("state", "finished") in ("finished", "preempted", "starts again")
        run.finish(exit_code=0 if well else 1)
        line = f"W&B: upload this run with: {sync_command(folder)}" if offline else f"W&B: {url}"
        self._last_lines = [line]


def write_offline_run(run_folder: Path, options: WandbOptions | None = None) -> str:
    """Write all of a run's metrics.jsonl as a new offline W&B run with an id of its own; returns the line
    that uploads it.

    For a run whose upload broke off for good, or one that was trained with ``--wandb disabled``.
    """
    from scalesnn.tracking.jsonl import read_jsonl

    records = read_jsonl(run_folder / "metrics.jsonl")
    options = options or WandbOptions(config=_config_of(run_folder), name=run_folder.name)
    options.mode = "offline"
    whole = run_folder / f"wandb_whole_{secrets.token_hex(4)}"
    whole.mkdir()
    return WandbSink(whole, options, history=records, wait_s=3600.0).close({})[0]


def _config_of(run_folder: Path) -> dict[str, Any]:
    import yaml

    path = run_folder / "config.yaml"
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return loaded if isinstance(loaded, dict) else {}


def _leave_service() -> None:
    """Give up a service process that has ended; wandb would try it at exit, and print a traceback."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _is_synced(file: Path) -> bool:
    return file.with_suffix(".wandb.synced").exists()


def _folder(run: Any) -> Path:
    """Where wandb keeps this run (``run.dir`` is its ``files`` folder)."""
    return Path(run.dir).parent


def _why_offline(wandb: Any) -> str:
    """Why W&B cannot be online here, or nothing: no key, or the server does not take connections."""
    settings = wandb.setup().settings
    base_url = settings.base_url
    if not (
        os.environ.get("WANDB_API_KEY")
        or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        or settings.api_key
        or _key_in_netrc(base_url)
    ):
        return "no API key is configured (`wandb login` stores one)"
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = urlsplit(proxy or base_url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3.0).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error})"
    return ""


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _key_in_netrc(base_url: str) -> bool:
    import netrc

    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(urlsplit(base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").exists():
        print("usage: python -m scalesnn.tracking.wandb_sink RUN (with metrics.jsonl)", file=sys.stderr)
        sys.exit(2)
    print(write_offline_run(Path(sys.argv[1])))
