"""tools/kernel_report.py: what it reads from machine code, and the goals that the kernels meet."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from variants import unit_variant

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

pytest.importorskip("cuda.bindings.nvrtc", reason="reading machine code needs NVRTC")
kernel_report = pytest.importorskip("kernel_report")
sass = pytest.importorskip("sass")
speed_model = pytest.importorskip("speed_model")

H100 = speed_model.DEVICES[1]
GOALS = {"forward": 30, "backward": 60, "statistics": 30}  # instructions per neuron-step
SMALL = """extern "C" __global__ void __launch_bounds__(256)
small(const float* __restrict__ x, float* y, int n, int m) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 256) {
        float sum = x[i] * x[i + n] - x[i + 2 * n];
        #pragma unroll 1
        for (int k = 1; k < m; k++) sum += 1 / x[i * k];
        y[i] = sum;
    }
}"""


@pytest.fixture(autouse=True)
def disassembler() -> None:
    try:
        sass.nvdisasm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_loops_and_what_is_in_flight_are_read_from_machine_code() -> None:
    kernel = sass.kernel_of(sass.nvrtc_compile(SMALL, "sm_90"))
    (outer,) = [loop for loop in kernel.loops if loop.children]
    (inner,) = outer.children

    def loads(trips: float) -> float:
        return sum(n for i, n in kernel.path(outer, lambda _: trips) if i.name == "LDG")

    assert (kernel.name, kernel.spills) == ("small", 0)
    assert (loads(0), loads(1), loads(10)) == (3, 4, 13)
    before = [i for i, _ in kernel.path(outer, lambda _: 0)]
    assert speed_model.in_flight([(i, 1.0) for i in before]) == 12, "three loads are sent before one is used"
    assert not any(
        i.opcode.startswith("CALL") and "$" in i.operands for i, _ in kernel.path(inner, lambda _: 1)
    )
    assert 8 <= len(kernel.path(inner, lambda _: 1)) <= 30


def test_registers_limit_the_resident_threads() -> None:
    found = [speed_model.resident_threads(registers, H100) for registers in (24, 32, 33, 64, 65, 128, 255)]
    assert found == [2048, 2048, 1536, 1024, 768, 512, 256]


def meets_the_goals(kernel: str, dtype: torch.dtype, T: int, last: bool, device: speed_model.Device) -> None:
    found = kernel_report.prediction(unit_variant(kernel, dtype, T, channels_last=last), T, device)
    assert found.spills == 0
    assert found.instructions <= GOALS[kernel]
    assert found.share >= 0.8, found


@pytest.mark.parametrize("kernel", GOALS)
def test_kernels_are_predicted_to_use_the_bandwidth(kernel: str) -> None:
    meets_the_goals(kernel, torch.bfloat16, 8, True, H100)


@pytest.mark.long
@pytest.mark.parametrize("device", speed_model.DEVICES[:2], ids=lambda device: device.name)
@pytest.mark.parametrize("kernel", GOALS)
def test_all_kernels_are_predicted_to_use_the_bandwidth(kernel: str, device: speed_model.Device) -> None:
    for dtype, T, last in itertools.product(kernel_report.DTYPES, (4, 8, 16), (True, False)):
        meets_the_goals(kernel, dtype, T, last, device)


@pytest.mark.long
@pytest.mark.parametrize("neuron", kernel_report.NEURONS)
def test_no_kernel_spills(neuron: str) -> None:
    for dtype, T, device, name in itertools.product(
        kernel_report.DTYPES, (4, 8, 16, 32), speed_model.DEVICES, ("forward", "backward")
    ):
        variant = unit_variant(name, dtype, T, **kernel_report.NEURONS[neuron])
        spills = kernel_report.kernel(variant, device.architecture).spills
        assert spills <= (4 if T > 16 else 0), (
            variant,
            device.name,
        )  # 4: a register, once a thread and once a tile


def test_the_spilling_of_registers_is_seen() -> None:
    code = "#define MIN_BLOCKS 8\n" + kernel_report.variant_source(
        *unit_variant("backward", torch.bfloat16, 8)
    ).replace("#define MIN_BLOCKS 2\n", "")
    assert sass.kernel_of(sass.nvrtc_compile(code, "sm_90")).spills > 0


def test_gpu_check_holds_the_predictions_against_measured_times() -> None:
    gpu_check = pytest.importorskip("gpu_check")
    x = torch.empty(8, 2, 4, 4, 4, dtype=torch.bfloat16)
    seconds = {"forward": x.numel() * (2 + 2 + 1 / 8) / 1e12, "backward": x.numel() * 6 / 2e12, "other": 1.0}
    bandwidths = {"peak_bytes_per_s": 2e12, "copy_bytes_per_s": 1.0}
    found = gpu_check.against_model(seconds, x, "NVIDIA H100 80GB HBM3", bandwidths)
    shares = {row["kernel"]: row["measured_share"] for row in found}
    assert shares == pytest.approx({"forward": 0.5, "backward": 1.0})
    predicted = {row["kernel"]: row["predicted_share"] for row in found}
    for kernel, share in predicted.items():
        variant = unit_variant(kernel, torch.bfloat16, 8, channels_last=False)
        assert share == pytest.approx(kernel_report.prediction(variant, 8, H100).share)  # the file is of now
    assert gpu_check.against_model(seconds, x, "Another GPU", bandwidths) == []
