"""The CPU build: several processes at once, builds that died, machines without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = (
    "import logging; logging.basicConfig(format='%(message)s', level=logging.INFO)\n"
    "import torch; from scalesnn import neuron, surrogate\n"
    "node = neuron.IFNode(step_mode='m', surrogate_function=surrogate.ATan())\n"
    "x = torch.ones(2, 3, requires_grad=True); node(x).sum().backward(); print('spikes', x.grad.shape)\n"
)


def start(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "SCALESNN_CACHE": str(tmp_path / "cache"), **environment}
    return subprocess.Popen([sys.executable, "-c", USE], env=env, stdout=-1, stderr=-1, text=True)


@pytest.mark.long
def test_processes_that_build_at_once_and_a_build_that_died(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "build-dead").mkdir(parents=True)
    (cache / "build-dead" / "lock").touch()
    processes = [start(tmp_path) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert "spikes" in out
        assert "fused CPU kernels" in err
    assert len(list(cache.glob("neuron_*.so"))) == 2, "all but the backward kernel, and that of ATan"
    for lock in cache.glob("*.lock"):
        assert lock.stat().st_size == 0  # left behind, held by nobody
    out, err = start(tmp_path, PATH="/nonexistent").communicate(timeout=100)
    assert "no C++ compiler" in err, "without a compiler its version, and so the library, is unknown"


def test_without_a_compiler_neurons_run_in_plain_torch(tmp_path: Path) -> None:
    process = start(tmp_path, PATH="/nonexistent")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "spikes" in out
    notices = [line for line in err.splitlines() if "no C++ compiler on PATH" in line]
    assert len(notices) == 1
    assert "neurons on cpu: torch" in err


def test_a_compiler_that_fails_is_a_notice_too(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\nexit 1\n')
    broken.chmod(0o755)
    out, err = start(tmp_path, CXX=str(broken)).communicate(timeout=100)
    assert "spikes" in out, err
    assert "neurons run in plain torch" in err


@pytest.mark.parametrize("variable", ["SCALESNN_CACHE"])
def test_the_cache_is_where_the_user_says(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalesnn.kernels import cpu

    monkeypatch.setenv(variable, str(tmp_path / "here"))
    assert cpu.cache_folder() == tmp_path / "here"
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    assert cpu.cache_folder() != tmp_path / "file" / "below"


LOAD = (
    "from scalesnn.kernels.build import shared_library\n"
    "print(shared_library('small', 'extern \"C\" int answer() { return 42; }', ('-O0',)).answer())\n"
)


def test_a_damaged_library_in_the_cache_is_built_again(tmp_path: Path) -> None:
    """A full disk cuts files; loading a cut library would be a SIGBUS."""
    environment = {**os.environ, "SCALESNN_CACHE": str(tmp_path)}

    def load() -> str:
        done = subprocess.run(
            [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, (done.returncode, done.stderr)
        return done.stdout

    assert load() == "42\n"
    (library,) = tmp_path.glob("small_*.so")
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        library.write_bytes(damaged)
        assert load() == "42\n"
        assert len(library.read_bytes()) == len(whole)
    time = library.stat().st_mtime_ns
    assert load() == "42\n"
    assert library.stat().st_mtime_ns == time, "what is whole is not built again"
