"""What the benchmarks share: the machine's name, results as JSON, nets of scalesnn and of SpikingJelly side
by side."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "RESULTS",
    "in_turn",
    "machine",
    "make_ours",
    "make_spikingjelly",
    "peak_above",
    "resident",
    "save",
    "static_images",
    "training_step",
]

RESULTS = Path(__file__).parent / "results"
sys.path.insert(1, str(Path(__file__).parents[1]))  # scalesnn, where it is not installed


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine, as the results name it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    facts = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def save(name: str, record: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


def in_turn(
    script: str, contenders: Sequence[str], rounds: int, environment: Mapping[str, str] | None = None
) -> dict[str, list[Any]]:
    """What ``script --only CONTENDER`` prints as JSON in its last line, in a process of its own for each,
    round after round; one that fails is named and has fewer values.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, values in results.items():
            command = [sys.executable, script, *sys.argv[1:], "--only", name]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, **(environment or {})},
            )
            if done.returncode:
                print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
                continue
            values.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, values[-1], flush=True)
    return results


def resident() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_above(run: Callable[[], Any], every_s: float = 0.0005) -> int:
    """By how many bytes resident memory rises above what it is now while ``run`` runs. Free memory that the
    process holds is given back before."""
    ctypes.CDLL(None).malloc_trim(0)
    loaded = peak = resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(every_s):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        over.set()
        thread.join()
    return peak - loaded


def make_ours(net: str = "spiking_resnet18", **kwargs: Any) -> nn.Module:
    """scalesnn's net with IF neurons and ATan, in multi-step mode."""
    from scalesnn import neuron, surrogate
    from scalesnn.model import spiking_resnet

    make = getattr(spiking_resnet, net)
    model = make(
        spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True, **kwargs
    )
    from scalesnn import functional

    functional.set_step_mode(model, "m")
    return model


def make_spikingjelly(net: str = "spiking_resnet18", backend: str = "torch", **kwargs: Any) -> nn.Module:
    """SpikingJelly's net, the same."""
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import spiking_resnet

    make = getattr(spiking_resnet, net)
    model = make(
        spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True, **kwargs
    )
    functional.set_step_mode(model, "m")
    if backend != "torch":
        functional.set_backend(model, backend, neuron.IFNode)
    return model


def static_images(
    T: int, N: int, size: int, device: str = "cpu", channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """One batch of noise repeated over T, as the trainers feed it, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N, 3, size, size, generator=generator).to(device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(0, 1000, (N,), generator=generator).to(device)
    return images.unsqueeze(0).expand(T, -1, -1, -1, -1), targets


def training_step(model: nn.Module, x: Tensor, targets: Tensor, reset: Callable[[nn.Module], None]) -> float:
    """Forward, loss and backward of one batch; returns the loss."""
    model.zero_grad(set_to_none=True)
    loss = torch.nn.functional.cross_entropy(model(x).mean(0), targets)
    loss.backward()
    value = loss.item()
    reset(model)
    return value
