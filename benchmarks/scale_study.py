"""A simulated scale study: step time and memory on 8 to 4,096 GPUs for each way of parallelism.

    python benchmarks/scale_study.py

Counted here, under FakeTensorMode: parameters, FLOPs and saved bytes of scalesnn's nets in bf16. Published:
what an H100 node and its network can do (``Machine``). Assumed: the efficiencies of ``Assumptions``. No
cluster was used; the figures say which strategy is limited by what, not what a run will measure. Writes
benchmarks/results/scale_study.json and prints the tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass

import torch
from common import machine, make_ours, save
from saved_bytes import count
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

GPUS = (8, 32, 128, 512, 1024, 4096)
STRATEGIES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "HSDP")


@dataclass(frozen=True)
class Machine:
    """An H100 SXM5 node by NVIDIA's data sheets, with one 400 Gb/s port (ConnectX-7) per GPU."""

    gpus_per_node: int = 8
    flops: float = 989e12  # bf16, dense, per s
    memory_bytes: float = 80e9
    memory_rate: float = 3.35e12  # B/s, HBM3
    nvlink_rate: float = 450e9  # B/s, one direction, per GPU
    network_rate: float = 50e9  # B/s, one direction, per GPU


@dataclass(frozen=True)
class Assumptions:
    """What nobody publishes; each is a round figure, to be replaced by a measurement."""

    compute: float = 0.35  # of the peak that convolutions reach
    memory: float = 0.75  # of HBM's rate that element-wise kernels reach
    link: float = 0.8  # of a link's rate that a large all-reduce reaches
    traffic_bytes: float = 16.0  # moved per neuron-step and training step, fused unit, bf16 (docs/kernels.md)
    nvlink_latency: float = 3e-6  # s per hop within a node
    network_latency: float = 8e-6  # s per hop between nodes
    bucket_bytes: float = 50e6  # gradients travel in pieces of this size
    overlap: float = 0.8  # of the backward pass during which communication may run
    jitter: float = 0.02  # standard deviation of one GPU's step time
    framework_bytes: float = 3e9  # CUDA context, NCCL's buffers, cuDNN's workspaces


@dataclass(frozen=True)
class Work:
    """One GPU's share of a step: counted, apart from the batch."""

    net: str
    parameters: float
    flops: float  # forward and backward, all T, whole batch of the GPU
    neuron_steps: float
    saved_bytes: float
    largest_layer: float  # parameters of the largest block, gathered at once under ZeRO-3 and FSDP
    widest: float  # elements of the widest activation over T
    batch: int


def count_work(net: str, T: int, batch: int, size: int = 224) -> Work:
    """Count a net under FakeTensorMode: nothing is computed or allocated."""
    from scalesnn import neuron

    with FakeTensorMode():
        model = make_ours(net)
        x = torch.empty(batch, 3, size, size).expand(T, -1, -1, -1, -1)
        saved, steps = count(model, x, True, neuron.BaseNode)
        flops = count_flops(make_ours(net), x)
    layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    first = T * batch * 64 * (size // 2) ** 2
    parameters = sum(p.numel() for p in model.parameters())
    name = f"{net}, T={T}, batch {batch}"
    return Work(name, parameters, flops, steps, saved, max(layers), first, batch)


def count_flops(model: nn.Module, x: Tensor) -> float:
    """FLOPs of forward and backward: those of convolutions and linear layers, three times the forward's."""
    total = 0.0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = getattr(module, "weight", None)
        assert weight is not None
        total += 2.0 * output.numel() * weight.numel() / weight.shape[0]

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    model(x)
    return 3 * total


def widened(work: Work, width: int) -> Work:
    """The same net with ``width`` times the channels, by scaling: weights and FLOPs grow with its square."""
    return Work(
        f"{work.net}, {width} × as wide", work.parameters * width**2, work.flops * width**2,
        work.neuron_steps * width, work.saved_bytes * width, work.largest_layer * width**2, work.widest *
        width, work.batch,
    )  # fmt: skip


def transfer_seconds(nbytes: float, gpus: int, m: Machine, a: Assumptions) -> float:
    """What bandwidth alone costs a reduce-scatter or an all-gather: NVLink, then each GPU's own port."""
    local = min(gpus, m.gpus_per_node)
    nodes = math.ceil(gpus / m.gpus_per_node)
    seconds = nbytes * (local - 1) / local / (m.nvlink_rate * a.link)
    return seconds + nbytes / local * (nodes - 1) / nodes / (m.network_rate * a.link)


def one_way_seconds(nbytes: float, gpus: int, m: Machine, a: Assumptions) -> float:
    """A reduce-scatter or an all-gather of ``nbytes``: NCCL sends them round a ring of all GPUs."""
    nodes = math.ceil(gpus / m.gpus_per_node)
    hops = nodes * a.network_latency * (nodes > 1) + (gpus - nodes) * a.nvlink_latency
    return transfer_seconds(nbytes, gpus, m, a) + hops


def all_reduce_seconds(nbytes: float, gpus: int, m: Machine, a: Assumptions) -> float:
    """An all-reduce of ``nbytes``: as many bytes as both, but NCCL sends them along trees of nodes."""
    local = min(gpus, m.gpus_per_node)
    nodes = math.ceil(gpus / m.gpus_per_node)
    hops = (local - 1) * a.nvlink_latency + math.ceil(math.log2(nodes)) * a.network_latency
    return 2 * (transfer_seconds(nbytes, gpus, m, a) + hops)


def pieces(nbytes: float, a: Assumptions) -> tuple[int, float]:
    """How many buckets, and the size of each."""
    number = max(1, math.ceil(nbytes / a.bucket_bytes))
    return number, nbytes / number


def simulate(work: Work, strategy: str, gpus: int, m: Machine, a: Assumptions) -> dict[str, float]:
    """Step time and memory of one GPU.

    Returns:
        seconds of compute, of communication, of communication that nothing hides, of waiting for the
        slowest GPU; their step; images per second over all GPUs; efficiency against one node's rate; bytes
        of memory.
    """
    P = work.parameters
    local = min(gpus, m.gpus_per_node)
    compute = work.flops / (m.flops * a.compute)
    compute += work.neuron_steps * a.traffic_bytes / (m.memory_rate * a.memory)
    shards = {"DDP": 1, "HSDP": local}.get(strategy, gpus)
    buckets, size = pieces(4 * P, a)  # gradients travel in fp32
    if strategy == "DDP":
        backward, forward = buckets * all_reduce_seconds(size, gpus, m, a), 0.0
    elif strategy in ("ZeRO-1", "ZeRO-2"):
        # reduce-scatter under the backward pass; the new weights are gathered after the step, in the open
        backward = buckets * one_way_seconds(size, gpus, m, a)
        forward = buckets * one_way_seconds(size, gpus, m, a)
    else:
        # weights are gathered for the forward and for the backward pass: fp32 under ZeRO-3, bf16 under FSDP2
        count, part = pieces((4 if strategy == "ZeRO-3" else 2) * P, a)
        group = local if strategy == "HSDP" else gpus
        forward = count * one_way_seconds(part, group, m, a)
        backward = forward + buckets * one_way_seconds(size, group, m, a)
        if strategy == "HSDP" and gpus > local:
            nodes = gpus // local
            backward += 2 * 4 * P / local * (nodes - 1) / nodes / (m.network_rate * a.link)
            backward += 2 * buckets * math.ceil(math.log2(nodes)) * a.network_latency
    last = backward / max(1, buckets)  # the last bucket has nothing left to hide behind
    exposed = max(last, backward - a.overlap * compute * 2 / 3)
    if strategy in ("ZeRO-1", "ZeRO-2"):
        exposed += forward
    else:
        exposed += max(0.0, forward - a.overlap * compute / 3)
    waiting = a.jitter * compute * math.sqrt(2 * math.log(gpus))  # the expected maximum of so many
    step = compute + exposed + waiting
    gradients = 4 * P / (shards if strategy not in ("DDP", "ZeRO-1") else 1)
    optimizer = 4 * P / shards  # SGD's momentum
    weights = 4 * P / (shards if strategy in ("ZeRO-3", "FSDP2", "HSDP") else 1)
    gathered = 2 * work.largest_layer * 4 if strategy in ("ZeRO-3", "FSDP2", "HSDP") else 0.0
    working = 4 * work.widest * 2  # four bf16 tensors of the widest layer are alive at once
    memory = weights + gradients + optimizer + gathered + work.saved_bytes + working + a.framework_bytes
    return {
        "compute_s": compute,
        "communication_s": forward + backward,
        "exposed_s": exposed,
        "waiting_s": waiting,
        "step_s": step,
        "images_per_s": gpus * work.batch / step,
        "efficiency": compute / step,
        "memory_bytes": memory,
        "weights_and_states_bytes": weights + gradients + optimizer,
    }


def table(work: Work, results: dict[str, dict[int, dict[str, float]]], m: Machine) -> str:
    """Markdown: one row per strategy, one column per number of GPUs."""
    lines = [
        f"**{work.net}**: {work.parameters / 1e6:.1f} M parameters, {work.flops / 1e12:.2f} TFLOP and "
        f"{work.saved_bytes / 1e9:.1f} GB kept for backward per GPU and step.",
        "",
        "| ms per step (efficiency) | " + " | ".join(f"{n:,}" for n in GPUS) + " | GB per GPU, 8 → 4,096 |",
        "| --- |" + " ---: |" * (len(GPUS) + 1),
    ]
    for strategy, by_gpus in results.items():
        cells = [f"{r['step_s'] * 1e3:.0f} ({r['efficiency']:.0%})" for r in by_gpus.values()]
        sizes = [by_gpus[n]["memory_bytes"] for n in (GPUS[0], GPUS[-1])]
        marks = [f"{s / 1e9:.1f}" + ("" if s <= m.memory_bytes else " (too much)") for s in sizes]
        lines.append(f"| {strategy} | " + " | ".join(cells) + f" | {' → '.join(marks)} |")
    return "\n".join(lines)


def main() -> None:
    """Count, simulate, write and print."""
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    m, a = Machine(), Assumptions()
    works = [count_work("spiking_resnet50", 4, 64), count_work("spiking_resnet152", 8, 16)]
    works.append(widened(count_work("spiking_resnet152", 4, 4), 8))
    record = []
    for work in works:
        results = {s: {n: simulate(work, s, n, m, a) for n in GPUS} for s in STRATEGIES}
        print(table(work, results, m), end="\n\n")
        record.append({"work": asdict(work), "results": results})
    facts = {"counted_on": machine(), "machine": asdict(m), "assumptions": asdict(a)}
    save("scale_study", {**facts, "nets": record})


if __name__ == "__main__":
    main()
