"""The GPU's build: offline, for four architectures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from variants import GIVEN, unit_variant

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


VARIANTS = [  # dtype, steps, and what unit_variant takes
    (torch.float32, 32, "decay", {}),
    (torch.bfloat16, 8, "residual_bits", {"charge": 3}),
    (torch.float32, 4, "v_start", {"charge": 1, "hard_reset": False, "detach_reset": 1}),
    (torch.float16, 16, "residual", {"hard_reset": False, "tau": 1.7, "channels_last": False}),
    (torch.bfloat16, 32, "decay", {"charge": 3, "hard_reset": False, "normalised": False}),
    (torch.bfloat16, 16, "decay", {"v_reset": -0.1}),
    (torch.float32, 16, "decay", {"v_reset": -0.1, "channels_last": False}),
    (torch.float32, 1, "residual", {"charge": 0}),
    (torch.float64, 8, "grad_v", {"v_every_step": 1, "normalised": False}),
]
VARIANTS = VARIANTS[:2] + [pytest.param(variant, marks=pytest.mark.long) for variant in VARIANTS[2:]]


def code_of(kernel: str, variant: tuple) -> str:
    dtype, steps, also, others = variant
    if kernel in ("forward", "backward"):
        return variant_source(*unit_variant(kernel, dtype, steps, also, **others))
    last = others.get("channels_last", True)
    return variant_source(*unit_variant(kernel, dtype, min(steps, 8), channels_last=last))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x).replace("torch.", "") for x in v))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_every_kernel(architecture: str, variant: tuple) -> None:
    for kernel in GIVEN:
        cubin = nvrtc_compile(code_of(kernel, variant), architecture)
        assert b".text.scalesnn_" + kernel.encode() in cubin


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
    nvrtc_compile(variant_source(*unit_variant("backward", torch.float32, 1, surrogate=key)), "sm_90")


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
