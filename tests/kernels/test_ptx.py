"""The kernels' PTX on the CPU: the engine, the rule on fused multiply-adds, every kernel beside the shim."""

from __future__ import annotations

import ctypes
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_on_cpu import GpuOnCpu
from oracle import NEURONS
from ptx_instructions import UnknownPtxError
from ptx_on_cpu import CUPY_OPTIONS, PtxOnCpu, compile_ptx, run_ptx, to_ptx, unfused_problems
from ptx_to_cpp import translate
from torch import Tensor
from variants import unit_variant

from scalesnn import neuron, surrogate
from scalesnn.kernels import cpu, cuda, launch, normalisation, ops, packing
from scalesnn.kernels.records import UnitInputs
from scalesnn.kernels.source import variant_source

N = None
HEAD = ".version 9.2\n.target sm_90\n.address_size 64\n"


def kernel(body: str, registers: str = "", threads: int = 32) -> str:
    """A module with the kernel ``k(unused, in, out)``; in and out are in %rd1 and %rd2, 16 bytes a thread."""
    return f"""{HEAD}.visible .entry scalesnn_k(.param .u32 p0, .param .u64 p1, .param .u64 p2)
.maxntid {threads}, 1, 1
{{
    .reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<16>; .reg .f32 %f<16>; .reg .b64 %rd<8>;
    {registers}
    ld.param.u64 %rd1, [p1];
    ld.param.u64 %rd2, [p2];
    mov.u32 %r15, %tid.x;
    mul.wide.u32 %rd3, %r15, 16;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    {body}
    ret;
}}
"""


def run(body: str, inputs: np.ndarray, folder: Path, registers: str = "") -> np.ndarray:
    """What 32 threads of a kernel with this body write, [32, 4] words, for inputs of that shape."""
    library = run_ptx(kernel(body, registers), folder)
    inputs, out = np.ascontiguousarray(inputs), np.zeros((32, 4), dtype=np.uint32)
    assert inputs.nbytes == out.nbytes
    library.launch_k.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
    library.launch_k(1, 1, inputs.ctypes.data, out.ctypes.data)
    return out


# ------------------------------------------------------------------------------------------------ the engine
@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("frobnicate.b32 %r1, %r2;", "unknown opcode `frobnicate`"),
        ("add.rn.strange.f32 %f1, %f2, %f3;", "unknown modifier `.strange`"),
        ("mul.rz.f32 %f1, %f2, %f3;", "unknown modifier `.rz`"),
        ("mov.u32 %r1, %clock64.q;", "unknown operand"),
        ("bar.sync 1;", "a barrier of part of a block"),
        ("cvt.rn.f8x2.f32 %rs1, %f1, %f2;", "no pair of types"),
        (".weird %r1;", "unknown directive"),
    ],
)
def test_unknown_ptx_is_an_error_with_its_line(line: str, what: str) -> None:
    with pytest.raises(UnknownPtxError) as error:
        translate(kernel(line))
    assert what in str(error.value)


def test_instructions_compute_what_the_ptx_isa_says(tmp_path: Path) -> None:
    """Against numpy: vectors, packed conversions, shuffles, votes, shared memory, atomics, denormals."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((32, 4)).astype(np.float32)
    x[3, 2], x[4, 2], x[5, 3] = (
        1e-40,
        -3e-39,
        np.float32(1.17549435e-38),
    )  # two denormals, the least normal number
    body = """
    ld.global.nc.L1::no_allocate.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];
    mul.rn.ftz.f32 %f5, %f3, 0f3F800000;              // flushed to a nought of the same sign
    cvt.rn.bf16x2.f32 %r1, %f1, %f2;                  // %f1 above
    { .reg .b16 low, high; mov.b32 {low, high}, %r1; mov.b32 %r2, {high, low}; }
    { .reg .b32 %temp; mov.b32 %temp, %r2; }          // names of a scope, as libdevice has them
    { .reg .b32 %temp; mov.b32 %temp, %r2; mov.b32 %r2, %temp; }
    shfl.sync.bfly.b32 %r3|%p1, %r2, 16, 31, -1;
    setp.gt.and.f32 %p2|%p3, %f1, 0f00000000, %p1;
    @!%p2 bra $L_1;
    add.s32 %r3, %r3, 1;
$L_1:
    vote.sync.ballot.b32 %r4, %p2, -1;
    mov.u32 %r5, area;
    shl.b32 %r6, %r15, 2;
    add.s32 %r7, %r5, %r6;
    st.shared.f32 [%r7], %f4;
    bar.sync 0;
    xor.b32 %r8, %r6, 124;
    add.s32 %r8, %r5, %r8;
    ld.shared.f32 %f6, [%r8];
    atom.shared.add.u32 %r9, [area+128], 3;
    st.global.v4.b32 [%rd2], {%f5, %r3, %r4, %f6};
    """
    library = run_ptx(kernel(body, ".shared .align 16 .b8 area[256];"), tmp_path)
    library.launch_k.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
    out = np.zeros((32, 4), dtype=np.uint32)
    library.launch_k(1, 1, x.ctypes.data, out.ctypes.data)
    flushed = np.where(np.abs(x[:, 2]) < 1.17549435e-38, np.copysign(np.float32(0), x[:, 2]), x[:, 2])
    assert np.array_equal(out[:, 0], flushed.view(np.uint32))
    assert out[4, 0] == 1 << 31
    high, low = (torch.from_numpy(x[:, k].copy()).bfloat16().view(torch.int16).numpy() for k in (0, 1))
    swapped = low.view(np.uint16).astype(np.uint32) << 16 | high.view(np.uint16)
    assert np.array_equal(out[:, 1], swapped[np.arange(32) ^ 16] + (x[:, 0] > 0))
    assert set(out[:, 2]) == {int(sum(1 << k for k in range(32) if x[k, 0] > 0))}
    assert np.array_equal(out[:, 3], x[::-1, 3].copy().view(np.uint32))


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bfe.u32 %r4, %r1, 5, 9;", lambda a, b, c: a >> 5 & 511),
        ("bfe.s32 %r4, %r1, 28, 9;", lambda a, b, c: (a >> 28) - (16 if a >> 31 else 0)),
        ("bfi.b32 %r4, %r1, %r2, 7, 4;", lambda a, b, c: b & ~(15 << 7) | (a & 15) << 7),
        ("prmt.b32 %r4, %r1, %r2, 0x5410;", lambda a, b, c: a & 0xFFFF | b << 16),
        ("lop3.b32 %r4, %r1, %r2, %r3, 0x96;", lambda a, b, c: a ^ b ^ c),
        ("shf.l.wrap.b32 %r4, %r1, %r2, 9;", lambda a, b, c: (b << 32 | a) >> 23),
        ("shf.r.clamp.b32 %r4, %r1, %r2, 40;", lambda a, b, c: b),
        ("mul.hi.u32 %r4, %r1, %r2;", lambda a, b, c: a * b >> 32),
        ("mad.lo.s32 %r4, %r1, %r2, %r3;", lambda a, b, c: a * b + c),
        ("popc.b32 %r4, %r1;", lambda a, b, c: a.bit_count()),
        ("clz.b32 %r4, %r1;", lambda a, b, c: 32 - a.bit_length()),
        ("brev.b32 %r4, %r1;", lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
        ("min.s32 %r4, %r1, %r2;", lambda a, b, c: min(a, b, key=lambda x: x - (x >> 31 << 32))),
        ("max.u32 %r4, %r1, %r2;", lambda a, b, c: max(a, b)),
        ("shr.s32 %r4, %r1, 40;", lambda a, b, c: -(a >> 31)),
        ("shl.b32 %r4, %r1, 32;", lambda a, b, c: 0),
        ("rem.u32 %r4, %r1, %r2;", lambda a, b, c: a % b),
        ("cvt.s32.s16 %r4, %r1;", lambda a, b, c: (a & 0xFFFF) - (a & 0x8000) * 2),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_integer_instructions(line: str, expected: object, tmp_path: Path) -> None:
    words = np.random.default_rng(1).integers(1, 2**32, (32, 4), dtype=np.uint64).astype(np.uint32)
    registers = "ld.global.v4.u32 {%r1, %r2, %r3, %r9}, [%rd1];"
    out = run(f"{registers} {line} st.global.u32 [%rd2], %r4;", words, tmp_path)
    for row, result in zip(words, out, strict=True):
        assert int(result[0]) == expected(*(int(word) for word in row[:3])) % 2**32  # type: ignore[operator]


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "value", "expected"),
    [
        ("cvt.rzi.ftz.s32.f32 %r1, %f1;", -2.9, struct.pack("<i", -2)),
        ("cvt.rzi.s32.f32 %r1, %f1;", math.nan, struct.pack("<i", 0)),
        ("cvt.rzi.s32.f32 %r1, %f1;", 1e20, struct.pack("<i", 2**31 - 1)),
        ("cvt.rni.s32.f32 %r1, %f1;", 2.5, struct.pack("<i", 2)),
        ("cvt.rmi.f32.f32 %r1, %f1;", -2.5, struct.pack("<f", -3.0)),
        ("min.f32 %r1, %f1, 0f80000000;", math.nan, struct.pack("<f", -0.0)),
        ("min.ftz.f32 %r1, %f1, 0f80000000;", 0.0, struct.pack("<f", -0.0)),
        ("abs.ftz.f32 %r1, %f1;", -1e-40, struct.pack("<f", 0.0)),
        ("fma.rm.ftz.f32 %r1, %f1, 0f3F800001, 0f00000000;", 1.1, None),
        ("add.rn.ftz.sat.f32 %r1, %f1, 0f3F800000;", 1.5, struct.pack("<f", 1.0)),
        ("ex2.approx.ftz.f32 %r1, %f1;", 3.0, struct.pack("<f", 8.0)),
        ("rcp.rn.ftz.f32 %r1, %f1;", 3.0, struct.pack("<f", np.float32(1) / np.float32(3))),
    ],
)
def test_floating_point_instructions(line: str, value: float, expected: bytes | None, tmp_path: Path) -> None:
    inputs = np.full((32, 4), value, dtype=np.float32)
    out = run(f"ld.global.f32 %f1, [%rd1]; {line} st.global.u32 [%rd2], %r1;", inputs, tmp_path)
    if expected is None:  # rounded down: the largest float32 that is not above the exact product
        exact = float(np.float32(value)) * (1 + 2**-23)
        got = float(out[:, :1].copy().view(np.float32)[0, 0])
        assert got <= exact < float(np.nextafter(np.float32(got), np.float32(np.inf)))
    else:
        assert out[0, 0].tobytes() == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+4];", "not aligned"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("mov.u64 %rd4, 0; st.global.u32 [%rd4], %r15;", "null pointer"),
                ("st.global.u32 [%rd2], %r15; ld.global.nc.u32 %r1, [%rd2];", "the same launch has written"),
                ("setp.eq.u32 %p1, %r15, 3; @%p1 ret; vote.sync.ballot.b32 %r1, %p1, -1;", "diverges"),
            ]
        ),
    ],
)
def test_what_a_gpu_would_refuse_ends_the_process(body: str, message: str, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, numpy as np; sys.path[:0] = sys.argv[1:3]\n"
        "import test_ptx; test_ptx.run(sys.argv[3], np.zeros((32, 4), 'f4'), pathlib.Path(sys.argv[4]))"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(here), str(here.parents[1]), body, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode != 0
    assert message in ended.stderr


# ------------------------------------------------------------------------------------------------ the rule
def test_ptx_is_made_with_cupys_options(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pytest.importorskip("cupy.cuda.compiler")
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    seen: list[str] = []

    class Program:
        def __init__(self, *_: object, **__: object) -> None: ...

        def compile(self, options: tuple[str, ...], log: object) -> tuple[bytes, dict[str, str]]:
            seen.extend(options)
            raise InterruptedError

    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    monkeypatch.setattr(
        compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: ("-arch=sm_90", "cubin")
    )
    monkeypatch.setattr(compiler, "_preprocess", lambda *_: "")
    with pytest.raises(InterruptedError):
        compiler._compile_module_with_cache("", cuda.OPTIONS, arch="90")
    assert {*cuda.OPTIONS, *CUPY_OPTIONS} == set(seen) - {"-arch=sm_90"}


def test_no_product_is_fused_with_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    code = variant_source(*unit_variant("backward", torch.float32, 4))
    assert not unfused_problems(code, to_ptx(code))
    assert ".ftz.f32" in to_ptx(code)
    monkeypatch.setattr(cuda, "OPTIONS", ("-std=c++17", "--fmad=true"))
    problems = unfused_problems(code, to_ptx(code))
    assert any("fma.rn" in problem for problem in problems)
    with_exp = variant_source(*unit_variant("backward", torch.float32, 4, surrogate="alpha|exp(-alpha * x)"))
    assert not unfused_problems(with_exp, kernel("fma.rn.f32 %f1, %f2, %f3, %f4;")), (
        "CUDA's exp is made of fma"
    )
    assert unfused_problems(with_exp, kernel("mul.f32 %f1, %f2, %f3;")), "ptxas may fuse it"


# ------------------------------------------------------------------------------------------------ the kernels
def use(engine: GpuOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ops run on an engine."""
    monkeypatch.setattr(cpu, "call", engine.call)
    monkeypatch.setattr(launch, "slabs", engine.slabs)


def results(dtype: torch.dtype, setting: int, T: int, last: bool, norm: bool) -> list[Tensor]:
    """All that a training step of the unit computes, and its spikes packed and made again."""
    generator = torch.Generator().manual_seed(T + setting)
    x = torch.randn(T, 2, 33, 3, 5, generator=generator).to(dtype)
    residual = torch.randn(x.shape, generator=generator).to(dtype)
    if last:
        x, residual = (
            t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, 2))
            for t in (x, residual)
        )
    x.requires_grad_(), residual.requires_grad_()
    real = launch.real_dtype(dtype)
    decay = torch.tensor(0.4, dtype=real, requires_grad=True) if NEURONS[setting].learned else None
    u = UnitInputs(x, decay=decay, with_bits=True, neuron=NEURONS[setting].parameters)
    inputs, of_norm = [x] + [decay] * (decay is not None), []
    if norm:
        weight = torch.linspace(0.5, 2, 33, dtype=real).requires_grad_()
        bias = torch.linspace(-0.5, 0.5, 33, dtype=real).requires_grad_()
        running = [torch.zeros(33, dtype=dtype), torch.ones(33, dtype=dtype), torch.tensor(0)]
        sums = normalisation.statistics(x.detach())
        affine, statistics = normalisation.coefficients(sums, dtype, weight, bias, *running, 1e-5, 0.1)
        of_norm = [affine, statistics, *running, normalisation.packed_sums(sums)]
        u = u._replace(affine=affine, statistics=statistics, weight=weight, bias=bias, residual=residual)
        inputs += [weight, bias, residual]
    s, v, bits = ops.unit(u)
    weights = torch.randn(s.shape, generator=generator)
    grads = torch.autograd.grad((s * weights).sum() + v.sum(), inputs)
    packed = packing.pack(s.detach(), 1)
    whole = packing.unpack(packed, 1, list(s.shape), list(s.stride()), s.dtype)
    return [t.detach() for t in (*of_norm, s, v, bits, *grads, packed, whole)]


def equal_bits(engine: GpuOnCpu, other: GpuOnCpu, monkeypatch: pytest.MonkeyPatch, *case: object) -> None:
    use(other, monkeypatch)
    expected = results(*case)  # type: ignore[arg-type]
    use(engine, monkeypatch)
    for one, two in zip(results(*case), expected, strict=True):  # type: ignore[arg-type]
        assert torch.equal(one, two)


def test_a_step_in_ptx_gives_the_cpu_builds_spikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick sample: one neuron, forward and backward. `make long-tests` runs every kernel test on PTX."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 41, generator=generator).bfloat16()

    def step() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        s, v, _ = ops.unit(UnitInputs(leaf, neuron=NEURONS[2].parameters))
        (s * torch.arange(41.0)).sum().backward()
        return [s.detach(), v.detach(), leaf.grad]

    expected = step()
    engine = PtxOnCpu(tmp_path)
    use(engine, monkeypatch)
    for one, other in zip(step(), expected, strict=True):
        assert torch.equal(one, other)
    assert {"forward", "backward"} <= set(engine.calls)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", range(len(NEURONS)))
@pytest.mark.parametrize(("T", "last", "norm"), [(5, True, True), (5, False, True), (33, True, False)])
def test_every_kernel_in_ptx_equals_the_shim(
    dtype: torch.dtype,
    setting: int,
    T: int,
    last: bool,
    norm: bool,
    shim_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    equal_bits(PtxOnCpu(shim_folder), GpuOnCpu(shim_folder), monkeypatch, dtype, setting, T, last, norm)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["compute_80", "compute_100", "compute_120"])
def test_other_architectures_compute_the_same(
    architecture: str, shim_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(PtxOnCpu):
        def _variant(self, variant: tuple[object, ...]) -> ctypes.CDLL:
            return compile_ptx(variant_source(*variant), self.folder, architecture)

    for dtype in (torch.bfloat16, torch.float32):
        equal_bits(Other(shim_folder), GpuOnCpu(shim_folder), monkeypatch, dtype, 2, 5, True, True)


@pytest.mark.long
def test_denormals_are_noughts_on_a_gpu(shim_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy compiles with -ftz=true: what docs/kernels.md says of denormals."""
    x = torch.full((1, 1, 32), 1e-40)
    potentials = []
    for kind in (GpuOnCpu, PtxOnCpu):
        use(kind(shim_folder), monkeypatch)
        v = ops.unit(UnitInputs(x, neuron=NEURONS[0].parameters))[1]
        potentials.append(v.unique().item())
    assert potentials == [pytest.approx(1e-40, rel=1e-4), 0.0]


def closed_surrogates() -> list[surrogate.SurrogateFunctionBase]:
    names = set(surrogate.__all__) - {"heaviside", "SurrogateFunctionBase"}
    made = [getattr(surrogate, name)() for name in sorted(names)]
    return [s for s in made if s.kernel_expression is not None]


@pytest.mark.long
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("function", closed_surrogates(), ids=lambda s: type(s).__name__)
def test_every_surrogate_in_ptx(
    function: surrogate.SurrogateFunctionBase,
    double: bool,
    shim_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if double and "cos(" in str(function.kernel_expression):
        pytest.skip("the engine does not know calls, of which CUDA's cos in double has one (for |x| > 2^31)")
    use(PtxOnCpu(shim_folder), monkeypatch)
    x = torch.linspace(-3, 3, 512, dtype=torch.float64 if double else torch.float32).view(2, 1, 256)
    gradients = []
    for backend in ("auto", "torch"):
        leaf = x.clone().requires_grad_()
        node = neuron.IFNode(step_mode="m", surrogate_function=function, backend=backend)
        (node(leaf) * torch.linspace(-1, 1, 256)).sum().backward()
        gradients.append(leaf.grad)
    tolerance = 1e-11 if double else 2e-5
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)
