"""A GPU that is there but cannot be used stops the run with the cause; each rank takes its own GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import scalesnn
from scalesnn.base import UserError
from scalesnn.parallel import Topology, add_parallel_arguments, create_strategy
from scalesnn.parallel.devices import check_gpu, unusable_gpu, use_expandable_segments
from scalesnn.parallel.strategy import Strategy

ROOT = Path(scalesnn.__file__).resolve().parents[1]
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12020).\nPlease update it."


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with one NVIDIA GPU and its driver."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "dev/nvidiactl").touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version: 12\n"
    )
    return tmp_path


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parallel_arguments(parser)
    args = parser.parse_args(words)
    for name, value in {
        "batch_size": 4,
        "lr": 0.1,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "opt": "sgd",
    }.items():
        setattr(args, name, value)
    args.lr_scheduler, args.lr_warmup_epochs, args.disable_amp = "cosa", 0, False
    return args


def raising(error: Exception) -> Any:
    def init() -> None:
        raise error

    return init


def test_a_machine_without_a_gpu_has_no_problem(tmp_path: Path) -> None:
    assert unusable_gpu({"PATH": ""}, tmp_path) is None


def test_a_driver_that_is_too_old_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(OLD_DRIVER)))
    problem = unusable_gpu({"PATH": "", "CUDA_VISIBLE_DEVICES": "0,1"}, machine)
    assert problem is not None
    for part in (
        "/dev/nvidia0",
        "too old (found version 12020)",
        "driver 535.129.03",
        "CUDA 13.2",
        "'0,1'",
        "580",
    ):
        assert part in problem
    assert "\n" not in problem


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_cuda_visible_devices_that_hides_the_gpu_is_named(
    hidden: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    problem = unusable_gpu({"PATH": "", "CUDA_VISIBLE_DEVICES": hidden}, machine)
    assert problem is not None
    assert f"CUDA_VISIBLE_DEVICES={hidden!r} hides it" in problem


def test_a_build_without_cuda_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    problem = unusable_gpu({"PATH": ""}, machine)
    assert problem is not None
    assert f"torch {torch.__version__} is a build without CUDA" in problem


def test_a_device_that_a_job_may_not_open_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    (machine / "dev/nvidia0").unlink()
    (machine / "dev/nvidia0").mkdir()  # cannot be opened for writing, whoever asks
    problem = unusable_gpu({"PATH": ""}, machine)
    assert problem is not None
    assert f"{machine}/dev/nvidia0: Is a directory" in problem
    assert "--gres=gpu:N" in problem


def test_a_gpu_that_only_nvidia_smi_knows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA RTX 4090 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError("No CUDA GPUs are available")))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    path = f"{program.parent}:/bin:/usr/bin"
    problem = unusable_gpu({"PATH": path}, tmp_path)
    assert problem is not None
    assert "GPU 0: NVIDIA RTX 4090" in problem
    assert "No CUDA GPUs are available (driver unknown" in problem
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert unusable_gpu({"PATH": path}, tmp_path) is None


def test_auto_stops_where_a_gpu_cannot_be_used_and_cpu_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "scalesnn.parallel.strategy.unusable_gpu", lambda: "this machine has an NVIDIA GPU, but"
    )
    strategy = create_strategy(arguments(), Topology())
    with pytest.raises(UserError, match="has an NVIDIA GPU, but; --device cpu"):
        strategy.setup_device("auto")
    assert strategy.setup_device("cpu") == torch.device("cpu")


def test_the_entry_stops_in_one_line(tmp_path: Path) -> None:
    """What a user types, on a machine whose GPU is hidden from torch."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(ROOT / "launch/train.py"), "--output-dir", str(tmp_path / "runs")]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "GPU 0: NVIDIA H100" in line
    assert "CUDA_VISIBLE_DEVICES='' hides it; unset CUDA_VISIBLE_DEVICES" in line
    assert "--device cpu" in line
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_runs_no_kernel_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(
        "CUDA error: no kernel image is available for execution on the device\nCompile with …"
    )
    monkeypatch.setattr(torch, "ones", raising_with_arguments(error))
    with pytest.raises(UserError) as caught:
        check_gpu(torch.device("cuda", 0))
    assert "no kernel image is available for execution on the device; see nvidia-smi" in str(caught.value)
    assert "\n" not in str(caught.value)


def raising_with_arguments(error: Exception) -> Any:
    def function(*args: Any, **kwargs: Any) -> None:
        raise error

    return function


@pytest.fixture
def one_gpu_a_task(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CUDA with one visible GPU; returns the devices that were set."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr("scalesnn.parallel.strategy.check_gpu", lambda device: None)
    monkeypatch.setattr(Strategy, "_start_process_group", lambda self: None)
    monkeypatch.setattr(Strategy, "barrier", lambda self: None)
    monkeypatch.setattr(Strategy, "_agree_on_kernels", lambda self: None)
    environment = dict(os.environ)
    yield chosen
    os.environ.clear()
    os.environ.update(environment)


def test_with_gpus_per_task_deepspeed_is_told_the_only_gpu(
    one_gpu_a_task: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class DeepSpeed:
        @staticmethod
        def init_distributed(**settings: Any) -> None:
            told.append(os.environ["LOCAL_RANK"])

    monkeypatch.setattr("scalesnn.parallel.deepspeed.import_deepspeed", lambda verbose: DeepSpeed)
    topology = Topology(
        local_world_size=8, local_rank=3, rank=3, world_size=8, source="slurm", interface="lo"
    )
    args = arguments("--deepspeed_config", str(ROOT / "configs/zero2.json"))
    strategy = create_strategy(args, topology)
    assert strategy.setup_device("auto") == torch.device("cuda", 0)
    assert one_gpu_a_task == [0]
    assert told == ["0"]
    assert strategy.topology.local_rank == 3  # that of the machine, for logs and cores


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_settings_are_left_alone(name: str) -> None:
    environ = {name: "max_split_size_mb:64"}
    use_expandable_segments(environ)
    assert environ == {name: "max_split_size_mb:64"}


def test_torch_takes_the_allocators_settings_after_its_import(
    one_gpu_a_task: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    create_strategy(arguments(), Topology()).setup_device("auto")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    program = (
        "import torch; from scalesnn.parallel.devices import use_expandable_segments as use; use(); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ALLOC_CONF"}
    environment["PYTHONPATH"] = str(ROOT)
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "expandable_segments:True", done.stderr


def test_one_gpu_named_for_several_processes_is_refused(one_gpu_a_task: list[int]) -> None:
    topology = Topology(local_world_size=2, rank=1, local_rank=1, world_size=2, source="torchrun")
    strategy = create_strategy(arguments(), topology)
    with pytest.raises(UserError, match="--device cuda:1 names one GPU, but there are 2 processes"):
        strategy.setup_device("cuda:1")
