"""The lock by which a process owns a run's folder for as long as it lives.

It is a POSIX record lock (``fcntl.lockf``) on the file RUN/lock. The kernel drops it when the process ends,
however it ends; NFS carries it between machines (version 4 by itself, version 3 through lockd, which the
mount option ``nolock`` turns off), and children do not inherit it. The file's text, host and process id, is
only for messages: what counts is the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from scalesnn.base import UserError

__all__ = ["FolderInUseError", "RunLock"]

NAME = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
PATIENCE = 0.5  # seconds: another process that only looks holds a lock for a moment

_held: set[tuple[int, int]] = set()  # (device, inode): within one process the kernel does not refuse


class FolderInUseError(UserError):
    """Another living process owns the run's folder."""


class RunLock:
    """The lock of one folder, held from ``acquire`` to ``release``.

    Attributes:
        folder: of the run; it may be renamed while the lock is held.
        unsafe: why the file system has no locks; None if it has.
    """

    def __init__(self, folder: Path, handle: int, unsafe: str | None) -> None:
        self.folder = folder
        self.unsafe = unsafe
        self._handle: int | None = handle
        self._key = file_key(handle)
        _held.add(self._key)

    @classmethod
    def acquire(cls, folder: Path, patience: float = PATIENCE) -> RunLock:
        """Take the lock of ``folder``, which exists.

        Args:
            folder: of the run.
            patience: seconds to try for.

        Raises:
            FolderInUseError: another process has it; the message names its host and process id.
            UserError: the folder cannot be written to.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                lock = cls._try(folder)
            except OSError as error:
                raise UserError(f"{folder} cannot be written to ({error.strerror})") from None
            if lock is not None:
                return lock
            if time.monotonic() >= deadline:
                raise FolderInUseError(
                    f"{folder} is in use by {owner(folder)}: wait for that run or end it, "
                    "or give this one another --run-name"
                )
            time.sleep(min(0.1, patience))

    @classmethod
    def _try(cls, folder: Path) -> RunLock | None:
        path = folder / NAME
        known = file_key(path) if path.exists() else None
        if known in _held:  # opening and closing the file would drop this process's lock
            return None
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        unsafe = None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(handle)
                return None
            unsafe = (
                f"{folder}: no locks on its file system ({error.strerror}): nothing keeps a second run out"
            )
        try:
            replaced = file_key(path) != file_key(handle)
        except FileNotFoundError:
            replaced = True
        if replaced:  # deleted, by --clean, while this process opened it
            os.close(handle)
            return None
        text = f"process {os.getpid()} on host {socket.gethostname()}\n".encode()
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)
        return cls(folder, handle, unsafe)

    def release(self) -> None:
        """Give the lock back; further calls do nothing."""
        if self._handle is not None:
            _held.discard(self._key)
            os.close(self._handle)
            self._handle = None


def owner(folder: Path) -> str:
    """Who wrote himself into the lock of ``folder``: ``process 123 on host gpu01``."""
    path = folder / NAME
    if path.exists() and file_key(path) in _held:
        return f"this process ({os.getpid()}), which has a run in it already"
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def file_key(file: Path | int) -> tuple[int, int]:
    """What tells a file from all others on this machine: (device, inode)."""
    status = os.stat(file)
    return status.st_dev, status.st_ino
