"""Locks that a killed build left behind: torch's run-time builds would wait for them for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

__all__ = ["clear_stale_locks"]


def clear_stale_locks(root: Path | None = None, *, older_than: float = 30.0) -> list[Path]:
    """Remove the locks of builds of extensions that nobody is building.

    A lock counts as stale when it is older than ``older_than`` seconds and no process of this user works in
    its folder (compilers and ninja do while they build).

    Args:
        root: where torch keeps extensions; default: TORCH_EXTENSIONS_DIR, or torch's own default.

    Returns:
        the locks that were removed.
    """
    if root is None:
        chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
        root = Path(chosen) if chosen else Path(os.path.expanduser("~/.cache/torch_extensions"))
    removed: list[Path] = []
    busy: set[Path] | None = None
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        try:
            if time.time() - lock.stat().st_mtime < older_than:
                continue
            busy = working_folders() if busy is None else busy
            if lock.parent.resolve() not in busy:
                lock.unlink()
                removed.append(lock)
        except OSError:  # somebody else was first
            continue
    return removed


def working_folders() -> set[Path]:
    """The folders in which this user's processes work."""
    found: set[Path] = set()
    for process in psutil.process_iter():
        try:
            found.add(Path(process.cwd()).resolve())
        except (psutil.Error, OSError):
            continue
    return found
