"""The PTX that NVRTC makes of the kernels with CuPy's options, run on the CPU.

``PtxOnCpu`` is an engine like ``GpuOnCpu``. ``unfused_problems`` is the rule on fused multiply-adds.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from pathlib import Path

from gpu_on_cpu import GpuOnCpu
from ptx_to_cpp import entries, statements, translate

from scalesnn.kernels import cuda

__all__ = ["PtxOnCpu", "compile_ptx", "run_ptx", "to_ptx", "unfused_problems"]

CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # what CuPy adds to ours
FLAGS = ("-std=c++20", "-Og", "-ffp-contract=off", "-shared", "-fPIC", "-w")
HERE = Path(__file__).parent
FUSED_FUNCTIONS = r"\b(fma|exp|exp2|log|log2|sin|cos|tan|tanh|pow|erf|erfc|atan)f?\s*\("


def to_ptx(code: str, architecture: str = "compute_90") -> str:
    """Compile CUDA C++ to PTX as CuPy does."""
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(code.encode(), b"neuron.cu", 0, [], [])
    options = [o.encode() for o in (*cuda.OPTIONS, *CUPY_OPTIONS, f"--gpu-architecture={architecture}")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytearray(size)
    nvrtc.nvrtcGetPTX(program, text)
    return text.decode().rstrip("\0")


def unfused_problems(code: str, ptx: str) -> list[str]:
    """The instructions that round otherwise than the source says, or that ptxas may make to such.

    The rule: a module may hold ``fma`` only where its source names it, or a function of CUDA's mathematical
    library that is made of it (exp, log, sin, cos, …), as some surrogates do. Every other sum and product
    says how it is rounded (``add.rn``): without that, ptxas is free to fuse it.
    """
    without = re.sub(r"//[^\n]*", "", code)
    surrogate = "".join(re.findall(r"#define SURROGATE .*", without))
    allowed = re.search(FUSED_FUNCTIONS, surrogate) or re.search(r"\b(__)?fmaf?(_rn)?\s*\(|\bfma\.", without)
    problems = []
    for entry in entries(ptx):
        for text in statements(entry.body):
            opcode = re.sub(r"^@!?%\w+\s+", "", text).split(None, 1)[:1]
            name, *rest = (opcode or [""])[0].split(".")
            if not rest or rest[-1] not in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
                continue
            fused = name in ("fma", "mad") and not allowed
            open_to_fusion = name in ("add", "sub", "mul") and not {"rn", "rz", "rm", "rp"} & set(rest)
            if fused or open_to_fusion:
                problems.append(f"{entry.name}: {text}")
    return problems


def run_ptx(ptx: str, folder: Path) -> ctypes.CDLL:
    """The library of a PTX module: ``launch_NAME(columns, rows, …)`` for each of its kernels."""
    text = f'#include "{HERE / "ptx_machine.h"}"\n' + translate(ptx)
    made_by = [
        text,
        *((HERE / name).read_text(encoding="utf-8") for name in ("ptx_machine.h", "cuda_shim.h")),
    ]
    name = hashlib.sha256("\n".join(made_by).encode()).hexdigest()[:24]
    library = folder / f"ptx_{name}.so"
    if not library.exists():
        source = folder / f"ptx_{name}.cpp"
        source.write_text(text, encoding="utf-8")
        subprocess.run(["g++", *FLAGS, str(source), "-o", str(library)], check=True, timeout=300)
    return ctypes.CDLL(str(library))


def compile_ptx(code: str, folder: Path, architecture: str = "compute_90") -> ctypes.CDLL:
    """As ``gpu_on_cpu.compile_shim``, by way of PTX; refuses what breaks the rule on fused multiply-adds."""
    ptx = to_ptx(code, architecture)
    problems = unfused_problems(code, ptx)
    assert not problems, "fused multiply-adds, or sums that may become such: " + "; ".join(problems[:5])
    return run_ptx(ptx, folder)


class PtxOnCpu(GpuOnCpu):
    """Takes the path of ``cuda.call`` and runs the kernels' PTX."""

    def _variant(self, variant: tuple[object, ...]) -> ctypes.CDLL:
        from scalesnn.kernels.source import variant_source

        return compile_ptx(variant_source(*variant), self.folder)
