"""Kernels that do not compile, run or compute rightly on a GPU are found at their first use; torch goes on.

There is no GPU here: the check runs on the CPU's tensors, with the build of either engine, or with one that
fails as a GPU's would.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from scalesnn import neuron
from scalesnn.base import UserError
from scalesnn.kernels import cpu, cuda, launch, self_check, unit
from scalesnn.kernels.source import Variant, fields, unpacked
from scalesnn.parallel.strategy import Strategy

CPU = torch.device("cpu")
NO_NVRTC = "CuPy failed to load libnvrtc.so.13: OSError: cannot open shared object file"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in a process that has not used the kernels yet, where CuPy can be imported."""
    monkeypatch.setattr(self_check, "_given_up", None)
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    self_check._checked.cache_clear()
    yield
    self_check._checked.cache_clear()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are checked as a GPU's are."""
    monkeypatch.setattr(launch, "available", lambda device, dtype: self_check.problem(device, dtype) is None)


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: Any) -> None:
        raise RuntimeError(NO_NVRTC + "\nsecond line")

    monkeypatch.setattr(cpu, "call", call)


def test_right_kernels_pass(engine: str) -> None:
    assert self_check.problem(CPU, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_right_kernels_pass_in_every_dtype(dtype: torch.dtype) -> None:
    assert self_check.problem(CPU, dtype) is None


@pytest.mark.parametrize(
    ("kernel", "written", "result"),
    [
        ("statistics", "partial", "v"),
        ("coefficients", "affine", "v"),
        ("forward", "spikes", "spikes"),
        ("backward", "grad_x", "gradient of x"),
        ("channel_gradients", "coefficients", "gradient of x"),
        ("channel_gradients", "grad_weight", "gradient of weight"),
        ("normalise_backward", "grad_x", "gradient of x"),
    ],
)
def test_a_kernel_that_computes_wrongly_is_named_by_its_result(
    kernel: str, written: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpu.call

    def wrong(name: str, dtype: torch.dtype, surrogate: str | None, packed: bytes) -> None:
        right(name, dtype, surrogate, packed)
        if name == kernel:
            told = dict(zip([field for field, _ in fields()], unpacked(packed), strict=True))
            kind = ctypes.c_double if written == "partial" else ctypes.c_float
            of_channels = (2 if written in ("affine", "coefficients") else 1) * told["channels"]
            count = told["steps"] * told["size"] if written in ("spikes", "grad_x") else of_channels
            for i, value in enumerate(values := (kind * count).from_address(told[written])):
                values[i] = 0.9 * value - 0.1

    monkeypatch.setattr(cpu, "call", wrong)
    found = self_check.problem(CPU, torch.float32)
    assert found is not None
    assert found.startswith("the CUDA kernels compute wrongly on this GPU: the ")
    if kernel not in ("statistics", "coefficients"):
        assert f"the {result} in float32 differs" in found


def test_without_nvrtc_neurons_go_on_in_torch(no_nvrtc: None, as_on_a_gpu: None) -> None:
    x = torch.randn(4, 3, 5)
    given, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    neuron.IFNode(step_mode="m")(given).sum().backward()
    neuron.IFNode(step_mode="m", backend="torch")(reference).sum().backward()
    assert torch.equal(given.grad, reference.grad)  # type: ignore[arg-type]
    assert self_check.why_given_up() == f"the CUDA kernels do not run here: {NO_NVRTC}"


def test_the_warning_says_once_what_failed(
    no_nvrtc: None, as_on_a_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not unit.usable(torch.ones(2, 2, dtype=dtype), "auto")
    unit.log_backend.cache_clear()
    for _ in range(3):
        unit.log_backend("torch", "cuda")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert NO_NVRTC in warning.message
    assert "second line" not in warning.message


def test_after_a_failure_no_kernel_runs_in_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {torch.float32: "broken", torch.bfloat16: None}
    monkeypatch.setattr(self_check, "compare_with_torch", lambda device, dtype: broken[dtype])
    assert self_check.problem(CPU, torch.bfloat16) is None
    assert self_check.problem(CPU, torch.float32) == "broken"
    assert self_check.problem(CPU, torch.bfloat16) == "broken"


def test_backend_cupy_makes_it_an_error(no_nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = self_check.problem
    monkeypatch.setattr(self_check, "problem", lambda device, dtype: problem(CPU, dtype))
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    with pytest.raises(UserError, match=r"IFNode: backend 'cupy': .* libnvrtc.*'auto' runs without it"):
        neuron.IFNode(step_mode="m", backend="cupy").fuses(x)


def test_the_check_is_not_touched_by_the_modes_of_its_caller() -> None:
    def refuse(tensor: Any) -> Any:
        raise AssertionError("a tensor of the check was saved by the caller's hooks")

    state = torch.get_rng_state()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    ):
        assert self_check.problem(CPU, torch.float32) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_full_device_says_nothing_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cpu, "call", call)
    with pytest.raises(torch.OutOfMemoryError):
        self_check.problem(CPU, torch.float32)
    assert self_check.why_given_up() is None


def test_where_one_ranks_kernels_fail_no_rank_uses_them(as_on_a_gpu: None) -> None:
    rank: Any = SimpleNamespace(device=CPU, gather_objects=lambda own: [own, "no NVRTC"])
    Strategy._agree_on_kernels(rank)
    assert self_check.why_given_up() == "on rank 1: no NVRTC"
    assert not unit.usable(torch.ones(2, 2), "auto")


def test_a_module_is_compiled_by_one_process_while_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALESNN_CACHE", str(tmp_path))
    held = []

    class Module:
        def __init__(self, code: str, options: tuple[str, ...], backend: str) -> None:
            assert "scalesnn_##name" in code

        def compile(self) -> None:
            (file,) = tmp_path.glob("module_*.lock")
            with open(file) as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(file.name)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=Module))
    cuda._module.__wrapped__(0, Variant("forward", torch.float32))
    assert len(held) == 1


def test_cupy_can_be_imported_where_the_home_folder_cannot_be_written(tmp_path: Path) -> None:
    if not cuda.HAS_CUPY:
        pytest.skip("CuPy is not installed")
    program = (
        "from scalesnn.kernels import cuda; import os; print(cuda.why_not(), os.environ['CUPY_CACHE_DIR'])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "CUPY_CACHE_DIR")}
    environment |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path), "SCALESNN_CACHE": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100
    )
    word, folder = done.stdout.split()
    assert word == "None", done.stderr
    assert Path(folder).parent.parent.parent == tmp_path
    assert Path(folder).is_dir()


def test_each_architecture_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALESNN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.module_folder() == tmp_path / "cupy" / "sm_90"
