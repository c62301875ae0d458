"""Timing, throughput, and the profiler."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from scalesnn import functional, layer, neuron
from scalesnn.tracking import SpikeMonitor, StepProfiler, StepTimer
from scalesnn.tracking.peaks import peak_flops_of
from scalesnn.tracking.profiler import shares_of, top_operators


class Batches:
    """``number`` batches of 4 images, each after a wait."""

    def __init__(self, number: int, wait_s: float) -> None:
        self.number, self.wait_s = number, wait_s

    def __iter__(self):
        for _ in range(self.number):
            time.sleep(self.wait_s)
            yield torch.zeros(4, 3, 2, 2), torch.zeros(4)


def test_phases_data_and_rates_are_what_was_slept() -> None:
    timer = StepTimer(world_size=2, time_steps=3, hours_before=5.0)
    for _ in timer.data(Batches(5, 0.02)):
        with timer.phase("forward"):
            time.sleep(0.03)
        with timer.phase("backward"):
            time.sleep(0.05)
    record = timer.read()
    assert record["data_wait_s"] == pytest.approx(0.02, rel=0.5)
    assert record["time/forward_s"] == pytest.approx(0.03, rel=0.5)
    assert record["time/backward_s"] == pytest.approx(0.05, rel=0.5)
    parts = record["data_wait_s"] + record["time/forward_s"] + record["time/backward_s"]
    assert record["step_s"] == pytest.approx(parts, rel=0.15)
    assert record["images_per_s"] == pytest.approx(4 * 2 / record["step_s"], rel=1e-9)
    assert record["images_per_s_per_device"] == pytest.approx(record["images_per_s"] / 2)
    assert record["time_steps_per_s"] == pytest.approx(record["images_per_s"] * 3)
    computing = record["step_s"] - record["data_wait_s"]
    assert record["compute_images_per_s"] == pytest.approx(8 / computing, rel=1e-6)
    assert 5.0 < record["device_hours"] < 5.01
    assert record["memory/peak_bytes"] > 1e7
    assert timer.read() == {}


def test_time_between_two_passes_over_the_data_is_nobodys_step() -> None:
    timer = StepTimer()
    for _ in range(2):
        for place, _ in enumerate(timer.data(Batches(5, 0.01))):
            if place == 2:
                break  # an epoch that --max-steps ends
        time.sleep(0.3)  # evaluation
    assert timer.read()["step_s"] < 0.1


def test_communication_is_what_backward_does_after_the_last_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    timer = StepTimer()
    timer.watch_communication(model)
    for images, _ in timer.data(Batches(3, 0.0)):
        loss = model(images.flatten(1)[:, :4]).sum()
        with timer.phase("backward"):
            time.sleep(0.02)
            loss.backward()
            time.sleep(0.04)
    record = timer.read()
    assert record["time/communication_s"] == pytest.approx(0.04, rel=0.4)
    assert record["time/backward_s"] == pytest.approx(0.02, rel=0.6)


class GpuClock:
    """Stands for a GPU's stream: events take the time that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = self
        self.now, self.made = 0.0, 0

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                clock.made += 1

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1000

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 0)


def test_events_are_used_again_only_once_they_have_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GpuClock(monkeypatch)
    model = nn.Linear(4, 4)
    timer = StepTimer("cuda")
    timer.watch_communication(model)
    made = []
    for reading in range(4):
        for images, _ in timer.data(Batches(3, 0.0)):
            with timer.phase("forward"):
                gpu.now += 1
            with timer.phase("backward"):
                gpu.now += 2
                model(images.flatten(1)[:, :4]).sum().backward()
                gpu.now += 0.5
            with timer.phase("optimizer"):
                gpu.now += 0.25
        record = timer.read()
        phases = {
            name: record[f"time/{name}_s"] for name in ("forward", "backward", "communication", "optimizer")
        }
        assert phases == pytest.approx(
            {"forward": 1, "backward": 2, "communication": 0.5, "optimizer": 0.25}
        ), f"reading {reading}"
        made.append(gpu.made)
    assert made == [made[0]] * 4


def test_a_backward_pass_that_breaks_off_leaves_no_time_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GpuClock(monkeypatch)
    model = nn.Linear(4, 4)
    timer = StepTimer("cuda")
    timer.watch_communication(model)
    for _ in timer.data(Batches(1, 0.0)):
        with contextlib.suppress(RuntimeError), timer.phase("backward"):
            model(torch.ones(1, 4)).sum().backward()
            raise RuntimeError("out of memory")
        gpu.now += 7
        with timer.phase("backward"):  # no gradient of the first parameter in this one
            gpu.now += 2
    record = timer.read()
    assert record["time/backward_s"] == pytest.approx(2)
    assert "time/communication_s" not in record


def test_utilisation_counts_the_flops_of_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalesnn.tracking.timer.peak_flops", lambda device: 1e9)
    model = nn.Sequential(
        layer.Conv2d(3, 8, 3, bias=False), neuron.IFNode(backend="torch"), layer.Conv2d(8, 4, 3, bias=False)
    )
    functional.set_step_mode(model, "m")
    x = torch.rand(2, 4, 3, 8, 8)
    monitor = SpikeMonitor(model, every=1)
    with monitor.watch(1), FlopCounterMode(display=False) as counter:
        model(x)
    monitor.read()
    assert monitor.training_flops_per_image == pytest.approx(3 * counter.get_total_flops() / 4)
    timer = StepTimer()
    timer.flops_per_image = monitor.training_flops_per_image
    for _ in timer.data(Batches(2, 0.01)):
        pass
    record = timer.read()
    assert record["mfu"] == pytest.approx(record["images_per_s"] * timer.flops_per_image / 1e9)
    assert record["tflops_per_device"] == pytest.approx(record["mfu"] / 1e3)


def test_a_phase_costs_microseconds() -> None:
    timer = StepTimer()
    began = time.perf_counter()
    for _ in range(2000):
        with timer.phase("forward"):
            pass
    assert (time.perf_counter() - began) / 2000 < 100e-6


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("Tesla T4", 65.0),
        ("Some other device", None),
    ],
)
def test_peaks_are_found_by_the_devices_name(name: str, tflops: float | None) -> None:
    assert peak_flops_of(name) == (None if tflops is None else tflops * 1e12)


def profiled(steps: int, batches: int, folder: Path) -> list[str]:
    node = neuron.LIFNode(backend="torch")  # no compilation in the middle of it
    model = nn.Sequential(layer.Conv2d(3, 8, 3), layer.BatchNorm2d(8), node, layer.Flatten())
    functional.set_step_mode(model, "m")
    said: list[str] = []
    timer = StepTimer()
    profiler = StepProfiler(steps, folder, said.append)
    for _ in timer.data(Batches(batches, 0.01)):
        with timer.phase("forward"):
            loss = model(torch.rand(4, 8, 3, 16, 16)).sum()
        with timer.phase("backward"):
            loss.backward()
            functional.reset_net(model)
        profiler.step()
    profiler.close()
    return said


def test_profile_writes_a_trace_of_the_steps_and_says_what_cost_most(tmp_path: Path) -> None:
    said = profiled(3, 10, tmp_path / "profile")
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert names.count("scalesnn: forward") == 3
    assert any("convolution" in name for name in names)
    assert said[0].startswith("3 steps profiled")
    assert len(said) == 13  # the head line, the table's head and ten rows, the shares
    assert "convolution" in "".join(said[2:12])
    shares = dict(
        part.rsplit(" ", 2)[:2] for part in said[12].removeprefix("share of the time: ").split(", ")
    )
    assert sum(float(share) for share in shares.values()) == pytest.approx(100, abs=0.5)
    assert float(shares["data"]) > 10
    assert float(shares["convolution"]) > 1


def test_profile_of_a_training_that_ends_early_says_so(tmp_path: Path) -> None:
    assert profiled(30, 5, tmp_path / "profile") == [
        "--profile 30: the training ended too early, no trace is written"
    ]


def test_without_profile_nothing_is_recorded(tmp_path: Path) -> None:
    assert profiled(0, 5, tmp_path / "profile") == []
    assert not (tmp_path / "profile").exists()


class Entry:
    """One of ``key_averages()``: of an operator, or of what ran on the GPU."""

    def __init__(self, key: str, us: float, device_us: float = 0.0, mark: bool = False) -> None:
        self.key, self.count = key, 1
        self.self_cpu_time_total = self.cpu_time_total = us
        self.self_device_time_total = device_us
        self.device_type = DeviceType.CPU if us else DeviceType.CUDA
        self.is_user_annotation = mark


def test_on_a_gpu_kernels_count_once_and_the_operators_that_launched_them_do_not() -> None:
    """An operator's device time is that of its kernels, which have entries of their own."""
    events = [
        Entry("aten::cudnn_convolution", 30, 300),
        Entry("sm90_xmma_fprop_implicit_gemm_bf16", 0, 300),
        Entry("scalesnn::unit", 10, 50),
        Entry("scalesnn_forward", 0, 50),
        Entry("scalesnn::unit_backward", 10, 250),
        Entry("scalesnn_backward", 0, 200),
        Entry("scalesnn_statistics", 0, 50),
        Entry("nccl:all_reduce", 0, 100, mark=True),
        Entry("ncclDevKernel_AllReduce_Sum_bf16", 0, 100),
        Entry("aten::cudnn_batch_norm", 5, 50),
        Entry("void cudnn::bn_fw_tr_1C11_kernel_NCHW", 0, 50),
        Entry("aten::add", 5, 250),
        Entry("void at::native::vectorized_elementwise_kernel", 0, 250),
        Entry("scalesnn: waiting for data", 1_000_000),
        Entry("scalesnn: waiting for data", 0, 77, mark=True),
        Entry("ProfilerStep*", 9e6, 9e6),
    ]
    shares = shares_of(events, wall_s=5.0, cuda=True)
    assert shares["data"] == pytest.approx(0.2)
    assert shares["convolution"] == pytest.approx(0.8 * 0.3)
    assert shares["neuron kernels"] == pytest.approx(0.8 * 0.3)
    assert shares["communication"] == pytest.approx(0.8 * 0.1)
    assert shares["normalisation"] == pytest.approx(0.8 * 0.05)
    assert shares["other"] == pytest.approx(0.8 * 0.25)
    rows = top_operators(events, cuda=True)
    assert "sm90_xmma" in rows[1]
    assert not any("::unit" in row or "aten::" in row for row in rows)
    own = [float(row.split()[0]) for row in rows[1:]]
    assert sum(own) == pytest.approx(1.0)  # ms


def test_on_a_cpu_operators_count() -> None:
    events = [Entry("aten::mkldnn_convolution", 300), Entry("scalesnn::unit", 100), Entry("aten::add", 600)]
    shares = shares_of(events, wall_s=1e-3, cuda=False)
    assert shares["convolution"] == pytest.approx(0.3)
    assert shares["neuron kernels"] == pytest.approx(0.1)
