"""Host time and launches of a BatchNorm + neuron unit, forward + backward in training, without a GPU.

    python benchmarks/host_overhead.py --label after

The CUDA path runs on small CPU tensors: their addresses stand in for device pointers, and CuPy's launch is a
stub that counts. torch's own operators run, on a few hundred values; those that would launch a kernel are
counted by torch's profiler. Under the policy `layer` the convolutions' outputs and gradients are empty
tensors, so that the unit alone is measured.

On a GPU, CuPy and the driver add their own time to each of our launches, and torch about 4 µs to each of its.

Writes benchmarks/results/host_overhead.json, under the label: launches and microseconds of CPU time a unit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from common import RESULTS, machine, save
from cupy_backends.cuda.api import driver
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.kernels import cuda, launch, spike_conv
from scalesnn.memory import policy, source

UNITS = 8  # one after the other, so that the cost of a call of backward is shared
SHAPE = (4, 1, 64, 2, 2)  # [T, N, C, H, W]
MULTIPROCESSORS = 132  # of an H100
NO_LAUNCH = (  # beginnings of names
    *(
        "empty",
        "new_empty",
        "view",
        "stride",
        "select",
        "slice",
        "expand",
        "alias",
        "detach",
        "squeeze",
        "unsqueeze",
    ),
    *("transpose", "permute", "narrow", "split", "result_type", "resolve", "set_", "unbind", "movedim"),
    *("lift", "as_strided", "flatten", "unflatten", "reshape", "_reshape"),
)
COMPOSITE = ("to", "_to_copy", "contiguous", "clone", "stack", "zeros", "zeros_like", "full", "ones")
SYNC = ("_local_scalar_dense", "is_nonzero", "equal")

launched: Counter[str] = Counter()  # kernels of ours, by name


def stand_in() -> None:
    """Take the CUDA path on CPU tensors; a launch is only counted."""

    class Module:
        def __init__(self, **_: Any) -> None:
            pass

        def compile(self) -> None:
            pass

        def get_function(self, name: str) -> Any:
            return SimpleNamespace(kernel=SimpleNamespace(ptr=name))

    def launch_kernel(function: str, *_: Any) -> None:
        launched[function] += 1

    context = nullcontext()
    context.use = lambda: None  # type: ignore[attr-defined]
    calls = SimpleNamespace(Device=lambda _: context, runtime=SimpleNamespace(free=lambda _: None))
    sys.modules["cupy"] = SimpleNamespace(RawModule=Module, cuda=calls)  # type: ignore[assignment]
    driver.launchKernel = launch_kernel
    cuda.available()
    launch.on_gpu = lambda tensor: True
    launch._multiprocessors = lambda index: MULTIPROCESSORS  # type: ignore[assignment]
    torch.cuda.current_device = torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    spike_conv.suits = lambda *_: False  # the look-up is the CPU's


class Chain(nn.Module):
    """Units one after the other, each with a convolution before it or not."""

    def __init__(self, convolutions: bool) -> None:
        super().__init__()
        channels = SHAPE[2]
        self.units = nn.ModuleList()
        for _ in range(UNITS):
            unit = nn.Module()
            unit.conv = layer.Conv2d(channels, channels, 1, bias=False) if convolutions else None
            unit.bn = layer.BatchNorm2d(channels)
            unit.sn = neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True)
            self.units.append(unit)

    def forward(self, x: Tensor) -> Tensor:
        """[T, N, C, H, W] to spikes of the last unit."""
        for unit in self.units:
            x = unit.bn(x if unit.conv is None else unit.conv(x), neuron=unit.sn)
        return x


def chain(kind: str) -> Chain:
    """Units without a policy, or under ``layer``."""
    net = Chain(convolutions=kind == "layer")
    functional.set_step_mode(net, "m")
    if kind == "layer":
        policy.apply_policy(net, kind)
        source.Source._convolve = (
            lambda self, a, b: torch.empty_strided(  # type: ignore[method-assign]
                (b - a, *self.conv.out_shape[1:]), self.conv.out_stride
            )
        )
        source.Source.gradients = lambda self, of_y, a, b, mask: [  # type: ignore[method-assign]
            torch.empty_like(of_y) if mask[0] else None, torch.empty_like(self.weight), None
        ]  # fmt: skip
    return net


def step(net: Chain, x: Tensor, grad: Tensor) -> float:
    """Seconds of CPU time of forward and backward of all units."""
    net.zero_grad(set_to_none=True)
    x.grad = None
    start = time.process_time()
    net(x).backward(grad)
    seconds = time.process_time() - start
    functional.reset_net(net)
    return seconds


def yardstick(x: Tensor, grad: Tensor) -> float:
    """Seconds of CPU time of as many multiplications by 2, forward and backward: how fast the machine is."""
    x.grad = None
    start = time.process_time()
    y = x
    for _ in range(UNITS):
        y = y * 2
    y.backward(grad)
    return time.process_time() - start


def count_launches(event: Any, found: Counter[str]) -> None:
    """Count the operators that launch a kernel: not views, of composite ones what they call, and else not
    what they call (on a GPU one kernel casts and adds)."""
    kind, _, name = event.name.partition("::")
    if kind == "aten" and name not in COMPOSITE:
        if not name.startswith(NO_LAUNCH):
            found[name] += 1
        return
    for child in event.cpu_children:
        count_launches(child, found)


def operators(net: Chain, x: Tensor, grad: Tensor) -> Counter[str]:
    """Count torch's operators in one step that would launch a kernel, or wait for the device (SYNC)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(net, x, grad)
    found: Counter[str] = Counter()
    for event in profile.events():
        if event.cpu_parent is None:
            count_launches(event, found)
    return found


def measure(kind: str, steps: int) -> dict[str, Any]:
    """Launches and microseconds of a unit."""
    net = chain(kind)
    x = torch.randn(SHAPE).contiguous().requires_grad_()
    if kind == "layer":
        x = torch.rand(SHAPE).requires_grad_()
    grad = torch.randn(SHAPE)
    for _ in range(3):
        step(net, x, grad)
    launched.clear()
    step(net, x, grad)
    ours = {name: count / UNITS for name, count in launched.items()}
    torchs = {name: count / UNITS for name, count in operators(net, x, grad).items()}
    syncs = {name: torchs.pop(name) for name in SYNC if name in torchs}
    times = [step(net, x, grad) / UNITS * 1e6 for _ in range(steps)]
    multiplications = [yardstick(x, grad) / UNITS * 1e6 for _ in range(steps)]
    return {
        "launches": sum(ours.values()) + sum(torchs.values()),
        "microseconds": statistics.median(times),
        "microseconds_least": min(times),
        "multiplication_microseconds": statistics.median(multiplications),
        "multiplication_microseconds_least": min(multiplications),
        "ours": ours,
        "torch": torchs,
        "syncs": syncs,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label", default="now", help="under which the figures are kept")
    parser.add_argument("--steps", type=int, default=300, help="timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stand_in()
    found = {kind: measure(kind, args.steps) for kind in ("none", "layer")}
    for kind, figures in found.items():
        print(
            f"{kind:6} {figures['launches']:.1f} launches, {figures['microseconds']:.0f} µs "
            f"(least {figures['microseconds_least']:.0f}) a unit; of torch's multiplication "
            f"{figures['multiplication_microseconds']:.0f} µs (least "
            f"{figures['multiplication_microseconds_least']:.0f}); syncs {figures['syncs']}"
        )
        print(f"       ours {figures['ours']}")
        print(f"       torch {figures['torch']}")
    path = RESULTS / "host_overhead.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record[args.label] = {"machine": machine(), "shape": SHAPE, "units": UNITS, **found}
    save("host_overhead", record)


if __name__ == "__main__":
    main()
