"""Time of one fp32 training step on the CPU: spiking_resnet18 of scalesnn and of SpikingJelly, and
torchvision's ResNet-18 on the same T × N images, in turn, each in a process of its own.

    python benchmarks/step_time.py --T 8 --batch-size 2 --size 128 --rounds 3

Every process is set up as users have it: scalesnn as its Trainer sets the allocator
(``memory.use_arena``), the others as they are; one more contender is scalesnn without that.
Writes benchmarks/results/step_time.json: the times, and the medians of the ratios of a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from common import in_turn, machine, make_ours, make_spikingjelly, save, static_images, training_step

CONTENDERS = (
    "scalesnn",
    "spikingjelly",
    "scalesnn, contiguous",
    "scalesnn, system allocator",
    "torchvision resnet18",
)


def stepper(name: str, args: argparse.Namespace) -> Callable[[], object]:
    """What is timed of a contender."""
    last = name != "spikingjelly" and name != "scalesnn, contiguous"
    x, y = static_images(args.T, args.batch_size, args.size, channels_last=last)
    if name == "torchvision resnet18":
        import torchvision

        ann = torchvision.models.resnet18().to(memory_format=torch.channels_last)
        images = torch.randn(args.T * args.batch_size, 3, args.size, args.size)
        images = images.contiguous(memory_format=torch.channels_last)

        def step() -> None:
            ann.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(ann(images), y.repeat(args.T)).backward()

        return step
    if name == "spikingjelly":
        from spikingjelly.activation_based import functional as peer

        model = make_spikingjelly()
        return lambda: training_step(model, x, y, peer.reset_net)
    from scalesnn import functional
    from scalesnn.memory import use_arena

    if name != "scalesnn, system allocator":
        use_arena()
    own = make_ours()
    if last:
        own = own.to(memory_format=torch.channels_last)
    return lambda: training_step(own, x, y, functional.reset_net)


def measure(name: str, args: argparse.Namespace) -> list[float]:
    """Seconds of the steps after two that warm up."""
    step, times = stepper(name, args), []
    for _ in range(2 + args.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times[2:]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--T", type=int, default=8, help="time-steps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of a process")
    parser.add_argument("--only", choices=CONTENDERS, help="measure one in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    times = in_turn(__file__, CONTENDERS, args.rounds)
    medians = {name: [statistics.median(steps) for steps in rounds] for name, rounds in times.items()}
    ratios = {
        name: statistics.median(
            peer / own for peer, own in zip(medians["spikingjelly"], medians[name], strict=True)
        )
        for name in CONTENDERS
    }
    for name, ratio in ratios.items():
        print(f"{name:28} {min(medians[name]):.3f} s, {ratio:.2f} x as fast as SpikingJelly")
    save(
        "step_time",
        {"machine": machine(), "arguments": vars(args), "seconds": times, "times_as_fast": ratios},
    )


if __name__ == "__main__":
    main()
