"""The engines that run the kernel source: the CPU build, and the GPU's build behind a shim."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gpu_on_cpu import GpuOnCpu

from scalesnn.kernels import cpu, launch


@pytest.fixture(scope="session")
def shim_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run's builds of the GPU source lie."""
    return tmp_path_factory.mktemp("shim")


@pytest.fixture
def gpu_on_cpu(shim_folder: Path, monkeypatch: pytest.MonkeyPatch) -> GpuOnCpu:
    """From here on the ops run the GPU's drivers."""
    engine = GpuOnCpu(shim_folder)
    monkeypatch.setattr(cpu, "call", engine.call)
    monkeypatch.setattr(launch, "slabs", engine.slabs)
    return engine


@pytest.fixture(params=["cpu", "gpu on cpu"])
def engine(request: pytest.FixtureRequest) -> str:
    """Both builds of the one source."""
    if not cpu.available():
        pytest.fail("the kernels' tests need a C++ compiler")
    if request.param != "cpu":
        request.getfixturevalue("gpu_on_cpu")
    return str(request.param)


Maker = Callable[..., object]
