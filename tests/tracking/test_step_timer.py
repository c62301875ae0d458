"""Timing, throughput, and the profiler."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn
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


class Event:
    def __init__(self, key: str, us: float, device_us: float = 0.0) -> None:
        self.key, self.count = key, 1
        self.self_cpu_time_total = self.cpu_time_total = us
        self.self_device_time_total = device_us


def test_shares_put_operators_and_kernels_where_they_belong() -> None:
    events = [
        Event("scalesnn::spike_conv2d", 10, 100),
        Event("sm90_xmma_fprop_implicit_gemm_bf16", 0, 200),
        Event("scalesnn::unit_backward", 10, 300),
        Event("ncclDevKernel_AllReduce_Sum_bf16", 0, 100),
        Event("cudnn_batch_norm", 0, 0),
        Event("aten::batch_norm", 0, 50),
        Event("aten::add", 5, 250),
        Event("scalesnn: waiting for data", 1_000_000),
        Event("ProfilerStep*", 9e6, 9e6),
    ]
    shares = shares_of(events, wall_s=5.0, cuda=True)
    assert shares["data"] == pytest.approx(0.2)
    assert shares["convolution"] == pytest.approx(0.8 * 0.3)
    assert shares["neuron kernels"] == pytest.approx(0.8 * 0.3)
    assert shares["communication"] == pytest.approx(0.8 * 0.1)
    assert shares["normalisation"] == pytest.approx(0.8 * 0.05)
    assert shares["other"] == pytest.approx(0.8 * 0.25)
    assert "unit_backward" in top_operators(events, cuda=True)[1]
