"""The GPU's build: offline, for four architectures, without spills; and that CuPy is handed the same
arguments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import ATAN

from scalesnn import surrogate
from scalesnn.kernels.source import surrogate_key, variant_source

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]


def nvrtc_compile(code: str, architecture: str) -> bytes:
    """Compile with NVRTC, no driver needed; returns the cubin."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="the GPU build's check needs NVRTC")
    error, program = nvrtc.nvrtcCreateProgram(code.encode(), b"neuron.cu", 0, [], [])
    options = [b"-std=c++17", b"--fmad=false", f"--gpu-architecture={architecture}".encode()]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert b"warning" not in log.lower(), log.decode()
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return bytes(cubin)


VARIANTS = [  # dtype, steps, charge, hard reset, detached reset, parametric, normalised
    (torch.float32, 32, 2, True, False, True, True),
    (torch.bfloat16, 8, 3, True, False, False, True),
    (torch.float32, 4, 1, False, True, False, True),
    (torch.float16, 32, 2, False, False, False, True),
    (torch.bfloat16, 32, 3, False, False, True, False),
    (torch.float32, 1, 0, False, False, False, True),
    (torch.float64, 8, 2, True, False, False, False),
]
VARIANTS = VARIANTS[:2] + [pytest.param(variant, marks=pytest.mark.long) for variant in VARIANTS[2:]]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x).replace("torch.", "") for x in v))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_every_kernel(architecture: str, variant: tuple) -> None:
    dtype, steps, *rest = variant
    assert b".text.scalesnn_backward" in nvrtc_compile(
        variant_source(dtype, ATAN, steps, *rest), architecture
    )
    cubin = nvrtc_compile(variant_source(dtype, None, 1, *rest), architecture)
    for kernel in (b"forward", b"statistics", b"normalise_backward", b"pack", b"unpack"):
        assert b".text.scalesnn_" + kernel in cubin


def closed_surrogates() -> list[surrogate.SurrogateFunctionBase]:
    found = [
        getattr(surrogate, name)
        for name in surrogate.__all__
        if name not in ("heaviside", "SurrogateFunctionBase")
    ]
    made = [cls() for cls in found]
    return [s for s in made if s.kernel_expression is not None]


@pytest.mark.parametrize("function", closed_surrogates(), ids=lambda s: type(s).__name__)
def test_every_surrogate_compiles(function: surrogate.SurrogateFunctionBase) -> None:
    key = surrogate_key(str(function.kernel_expression), tuple(function.kernel_parameters()))
    nvrtc_compile(variant_source(torch.float32, key, 1, 1, True, False, False, True), "sm_90")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[0] != torch.float64], ids=str)
def test_no_kernel_spills(variant: tuple, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    dtype, steps, *rest = variant
    found = []
    for surrogate_key_or_none in (ATAN, None):
        source = tmp_path / "neuron.cu"
        source.write_text(variant_source(dtype, surrogate_key_or_none, steps, *rest))
        command = [
            "nvcc",
            "-cubin",
            "-arch=sm_90",
            "-std=c++17",
            "--fmad=false",
            "-Xptxas",
            "-v",
            str(source),
        ]
        command += ["-o", str(tmp_path / "neuron.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
        found += re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        )
    assert len(found) == 6
    assert all(sizes == ("0", "0", "0") for sizes in found)


def test_gpu_check_says_that_there_is_no_gpu() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 3
    assert "there is no GPU" in run.stdout
    assert not run.stderr.count("Traceback")


@pytest.mark.long
@pytest.mark.distributed
def test_what_gpu_check_does_with_the_product_is_rehearsed_on_the_cpu() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_product.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script), "--rehearse"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WRONG" not in run.stdout
