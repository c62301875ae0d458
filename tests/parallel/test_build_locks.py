"""A lock that a killed build left is removed; one of a build that goes on is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scalesnn.parallel.build_locks import clear_stale_locks


def make_lock(root: Path, age: float) -> Path:
    folder = root / "py311_cpu" / "fused_adam"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (time.time() - age, time.time() - age))
    return lock


def test_stale_lock_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = make_lock(tmp_path, age=100)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert clear_stale_locks() == [lock]
    assert not lock.exists()


def test_young_lock_is_kept(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, age=1)
    assert clear_stale_locks(tmp_path) == []
    assert lock.exists()


def test_lock_of_a_build_that_goes_on_is_kept(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, age=100)
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=lock.parent)
    try:
        assert clear_stale_locks(tmp_path) == []
    finally:
        compiler.kill()
        compiler.wait()
    assert clear_stale_locks(tmp_path) == [lock]
