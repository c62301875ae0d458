"""Time of one fp32 training step on the CPU in a loop of one's own: nets of scalesnn and of SpikingJelly, and
torchvision's ANN on the same T × N images, in turn, each in a process of its own.

    python benchmarks/step_time.py --nets spiking_resnet18 spiking_resnet50 --T 8 --batch-size 2 --size 128

"own loop" is what anybody writes: a net of scalesnn.model, images as they come (contiguous), forward, loss,
backward, ``functional.reset_net``; no Trainer, no other allocator, no memory format asked for. The
optimizer's step is the same for all and left out.

Writes benchmarks/results/step_time.json: wall-clock and CPU seconds (of all threads) of every
step, and the medians of the ratios of a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import in_turn, machine, make_ours, make_spikingjelly, save, static_images, training_step

KINDS = ("own loop", "spikingjelly", "torchvision")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def stepper(kind: str, net: str, args: argparse.Namespace) -> Callable[[], object]:
    """What is timed of a contender."""
    x, y = static_images(args.T, args.batch_size, args.size)
    if kind == "torchvision":
        import torchvision

        ann = getattr(torchvision.models, net.removeprefix("spiking_"))().to(
            memory_format=torch.channels_last
        )
        images = torch.randn(args.T * args.batch_size, 3, args.size, args.size)
        images = images.contiguous(memory_format=torch.channels_last)

        def step() -> None:
            ann.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(ann(images), y.repeat(args.T)).backward()

        return step
    if kind == "spikingjelly":
        from spikingjelly.activation_based import functional as peer

        model = make_spikingjelly(net)
        return lambda: training_step(model, x, y, peer.reset_net)
    from scalesnn import functional

    own = make_ours(net)
    return lambda: training_step(own, x, y, functional.reset_net)


def measure(contender: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the steps after two that warm up, by each clock."""
    torch.set_num_threads(args.threads)
    kind, net = contender.split(", ")
    step = stepper(kind, net, args)
    times: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
    for _ in range(2 + args.steps):
        start = {clock: read() for clock, read in CLOCKS.items()}
        step()
        for clock, read in CLOCKS.items():
            times[clock].append(read() - start[clock])
    return {clock: seconds[2:] for clock, seconds in times.items()}


def compare(net: str, results: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast as SpikingJelly each contender is, by each clock; printed too."""
    ratios: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        ratios[kind] = {}
        for clock in CLOCKS:
            own, peer = (
                [statistics.median(steps[clock]) for steps in results[f"{k}, {net}"]]
                for k in (kind, "spikingjelly")
            )
            ratios[kind][clock] = statistics.median(p / o for p, o in zip(peer, own, strict=True))
            print(
                f"{net:18} {kind:14} {clock:4} {statistics.median(own):.3f} s, "
                f"{ratios[kind][clock]:.2f} x as fast as SpikingJelly"
            )
    return ratios


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=["spiking_resnet18", "spiking_resnet50"])
    parser.add_argument("--T", type=int, default=8, help="time-steps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--only", help="measure one in this process: 'KIND, NET'")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results = in_turn(__file__, [f"{kind}, {net}" for net in args.nets for kind in KINDS], args.rounds)
    ratios = {net: compare(net, results) for net in args.nets}
    record = {"machine": machine(), "arguments": vars(args), "times_as_fast": ratios, "seconds": results}
    save("step_time", record)


if __name__ == "__main__":
    main()
