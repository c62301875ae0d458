"""Jobs that survive preemption: a signal ends the training at a step boundary, and Slurm starts it again.

    SIGUSR1 (before the time limit, --signal=USR1@120) or SIGTERM (preemption, node shutdown, scancel),
    or Ctrl-C, which is not followed by a restart
      ├─ before the first step (images are listed, loaders tuned, memory planned): the handler ends it at once
      └─ later it sets a flag, nothing else
    after a step, or a batch of an evaluation: all ranks agree that some rank's flag is set
      └─ checkpoint ── interrupted.json ── scontrol requeue ── exit code 128 + signal
    Slurm starts the job again: the same run folder (named after the job), its last checkpoint, the same W&B
        run

Exit codes: 0 finished; 2 bad input, which a restart does not cure; 75 saved, but the batch script has to
requeue (no scontrol inside a container); 128 + signal saved after a signal; anything else is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from scalesnn.base import UserError

__all__ = [
    "Preemption",
    "StoppedBySignalError",
    "add_preemption_arguments",
    "is_restart",
    "job_identity",
    "job_run_name",
    "requeue_job",
]

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
PLEASE_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
AGREE_SECONDS = 1.0  # ranks ask each other about this often, so that fast steps do not pay for it


class Agreement(Protocol):
    """What is needed of a strategy: one collective question, and who asks."""

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank; a collective call."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""


def add_preemption_arguments(parser: ArgumentParser) -> None:
    """Define ``--max-requeues`` and ``--no-requeue``."""
    group = parser.add_argument_group("preemption")
    group.add_argument(
        "--max-requeues",
        default=3,
        type=int,
        metavar="N",
        help="restarts of a job in a row that may bring no step forward; then it ends with an error",
    )
    group.add_argument(
        "--no-requeue",
        action="store_true",
        help="on a signal save and end, but do not ask Slurm for a restart",
    )


class StoppedBySignalError(BaseException):
    """A signal came while there was nothing to save."""


class Preemption:
    """Listen for signals while a training runs.

    Use as a context: handlers are set on entry and put back on exit. In the loop, after each step,
    ``if preemption.agreed(strategy): save; break``; after it ``sys.exit(preemption.finish(...))``.

    Args:
        max_requeues: restarts in a row without progress that ``check_progress`` allows.
        requeue: whether ``finish`` asks Slurm to start the job again.
        environ: the variables of Slurm and torchrun.
    """

    def __init__(
        self, *, max_requeues: int = 3, requeue: bool = True, environ: Mapping[str, str] = os.environ
    ) -> None:
        if max_requeues < 0:
            raise UserError(f"--max-requeues must be at least 0, got {max_requeues}")
        self.max_requeues = max_requeues
        self.requeue = requeue
        self.environ = environ
        self.signal: signal.Signals | None = None
        self.was_agreed = False
        self._pid = os.getpid()
        self._at_once = False
        self._alone = environ.get("WORLD_SIZE", "1") == "1"  # no other rank to ask: answer at once
        self._before: dict[signal.Signals, Any] = {}
        self._every, self._until, self._last = 1, 1, time.monotonic()

    @property
    def requested(self) -> bool:
        """Whether a signal has come to this process."""
        return self.signal is not None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launch/train.py holds back an early one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context in which a signal raises StoppedBySignalError: for work that leaves nothing to save."""
        before = sys.unraisablehook

        def unraisable(problem: Any) -> None:
            if not issubclass(problem.exc_type, StoppedBySignalError):
                before(problem)
                return
            # it was raised in a finaliser, which Python does not leave that way: once more, a little later
            later = threading.Timer(0.05, os.kill, (self._pid, self.signal))
            later.daemon = True
            later.start()

        self._at_once, sys.unraisablehook = True, unraisable
        try:
            if not self.requested:
                yield
            if self.requested:
                raise StoppedBySignalError
        finally:
            self._at_once, sys.unraisablehook = False, before

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data loader's process, which inherited the handler
            return
        again = self.signal == signal.SIGINT
        if number != signal.SIGINT or not again:
            self.signal = signal.Signals(number)
        if self._at_once:
            raise StoppedBySignalError
        if number == signal.SIGINT:
            if again:
                raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step to end
            os.write(
                2,
                b"scalesnn: saving and ending after this step; Ctrl-C again ends at once\n",
            )

    def agreed(self, strategy: Agreement) -> bool:
        """Whether the training has to end here: the same answer on all ranks; all must call it each step.

        The question costs a small all-reduce that waits for the device, so it is put about once a second:
        after 1, 2, 4 … steps while those pass quickly, sooner again when any rank finds them slow.
        """
        if self.was_agreed:
            return True
        self._until -= 1
        if self._until > 0 and not self._alone:
            return False
        now = time.monotonic()
        slow = strategy.any_rank(now - self._last > AGREE_SECONDS)
        self._every = max(1, self._every // 2) if slow else min(64, self._every * 2)
        self._until, self._last = self._every, now
        self.was_agreed = strategy.any_rank(self.requested)
        return self.was_agreed

    def check_progress(self, strategy: Agreement, folder: Path, step: int) -> None:
        """Stop a loop of restarts; call it on all ranks once the last checkpoint is loaded, with its step.

        Counts in ``folder/restarts.json`` how often the job came back to the same step.

        Raises:
            UserError: on all ranks, where that was more than ``max_requeues`` times in a row.
        """
        times = 0
        if strategy.is_main:
            path = folder / "restarts.json"
            if is_restart(self.environ):
                try:
                    before = json.loads(path.read_text(encoding="utf-8"))
                    times = before["times"] + 1 if before["step"] == step else 0
                except (OSError, ValueError, KeyError):
                    times = 0
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": step, "times": times}) + "\n", encoding="utf-8")
        if strategy.any_rank(times > self.max_requeues):
            raise UserError(
                f"the job came back to step {step} more than --max-requeues {self.max_requeues} times "
                "without a step "
                f"forward: see {folder / 'logs'} for why it ends; save more often (--save-every), or "
                "ask for more time"
            )

    def finish(
        self, strategy: Agreement, folder: Path, step: int | None, notice: Callable[[str], None] = print
    ) -> int:
        """Mark the run as interrupted and ask for its restart; the checkpoint must have been written.

        Args:
            folder: of the run; gets ``interrupted.json``.
            step: of the checkpoint; None: the training had not begun.
            notice: told in one line what happens next, on rank 0.

        Returns:
            the exit code for this process; 0 where no signal came.
        """
        if not (self.was_agreed or self.requested):
            return 0
        number = self.signal or signal.SIGTERM
        outcome = "not asked for a restart"
        code = 128 + number
        if self.requeue and number != signal.SIGINT and slurm_job(self.environ):
            if not shutil.which("scontrol"):
                outcome, code = "the batch script requeues it", PLEASE_REQUEUE
            elif strategy.is_main:
                outcome = requeue_job(self.environ)
        if strategy.is_main:
            record = {"signal": number.name, "step": step, "time": time.time(), "outcome": outcome}
            (folder / "interrupted.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
            done = "ended before the first step" if step is None else f"saved at step {step}"
            notice(f"{number.name}: {done} in {folder}; {outcome}")
        return code


def slurm_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """The job as scontrol names it: ``1234``, or ``1230_4`` for a task of an array; None outside Slurm."""
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID") or None


def job_run_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """Name for the run folder of a batch job, the same after a restart: ``job1234``; None outside of one.

    torchrun's ``--rdzv-id`` names the run where there is no Slurm.
    """
    if job := slurm_job(environ):
        return f"job{job}"
    rendezvous = environ.get("TORCHELASTIC_RUN_ID", "none")
    if rendezvous == "none" or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", rendezvous):
        return None  # not given, or made up by --standalone
    return "job" + re.sub(r"[^\w.-]+", "-", rendezvous)


def job_identity(environ: Mapping[str, str] = os.environ) -> str | None:
    """What a job is called before and after a restart, and no other job is; None outside of one."""
    if job := slurm_job(environ):
        return f"slurm {job}"
    rendezvous = environ.get("TORCHELASTIC_RUN_ID")
    if rendezvous is None:
        return None
    if rendezvous != "none":
        return f"torchrun {rendezvous}"
    # no --rdzv-id: torchrun itself, this process's parent, lives through the restarts of its workers
    parent = os.getppid()
    try:
        born = (
            Path(f"/proc/{parent}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
    except (OSError, IndexError):
        born = ""
    return f"torchrun process {parent} of {born} on {socket.gethostname()}"


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Slurm or torchrun started this job before: it must go on from its last checkpoint."""
    counts = (environ.get("SLURM_RESTART_COUNT", "0"), environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def requeue_job(environ: Mapping[str, str] = os.environ) -> str:
    """``scontrol requeue`` for this job; returns in words what came of it.

    A job that is already ending is left alone: after scancel it must stay cancelled, and after a preemption
    with PreemptMode=REQUEUE Slurm itself starts it again.
    """
    job = slurm_job(environ)
    if job is None:
        return "not a Slurm job"
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, timeout=60
        )
        state = (re.search(r"\bJobState=(\S+)", shown.stdout) or [None, "unknown"])[1]
        if state != "RUNNING":
            return f"job {job} is {state}, so it is left to Slurm"
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol requeue {job} failed ({error}); submit the job again"
    if done.returncode:
        return f"scontrol requeue {job} failed ({done.stderr.strip()}); submit the job again"
    return f"job {job} is requeued"
