"""The engines that run the kernel source: the CPU build, the GPU's build behind a shim, and its PTX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gpu_on_cpu import GpuOnCpu
from ptx_on_cpu import PtxOnCpu

from scalesnn.kernels import cpu, launch


@pytest.fixture(scope="session")
def shim_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run's builds of the GPU source lie."""
    return tmp_path_factory.mktemp("shim")


@pytest.fixture(params=["shim", pytest.param("ptx", marks=pytest.mark.long)])
def gpu_on_cpu(
    request: pytest.FixtureRequest, shim_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> GpuOnCpu:
    """From here on the ops run the GPU's drivers: the source behind the shim, or the PTX made of it."""
    engine = (PtxOnCpu if request.param == "ptx" else GpuOnCpu)(shim_folder)
    return use_engine(engine, monkeypatch)


def use_engine(engine: GpuOnCpu, monkeypatch: pytest.MonkeyPatch) -> GpuOnCpu:
    """Let the ops run on an engine."""
    monkeypatch.setattr(cpu, "call", engine.call)
    monkeypatch.setattr(launch, "slabs", engine.slabs)
    return engine


@pytest.fixture(params=["cpu", "gpu on cpu", pytest.param("ptx on cpu", marks=pytest.mark.long)])
def engine(request: pytest.FixtureRequest, shim_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """All builds of the one source."""
    if not cpu.available():
        pytest.fail("the kernels' tests need a C++ compiler")
    if request.param != "cpu":
        kind = PtxOnCpu if request.param == "ptx on cpu" else GpuOnCpu
        use_engine(kind(shim_folder), monkeypatch)
    return str(request.param)


Maker = Callable[..., object]
