"""Time of one fp32 training step on the CPU: spiking_resnet18 of scalesnn and of SpikingJelly, and
torchvision's
ResNet-18 on the same T × N images, taken in turns.

    python benchmarks/step_time.py --T 8 --batch-size 2 --size 128 --rounds 7

Writes benchmarks/results/step_time.json: medians, and the ratio of the paired times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import machine, make_ours, make_spikingjelly, save, static_images, training_step


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--T", type=int, default=8, help="time-steps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that are timed")
    args = parser.parse_args()

    import spikingjelly.activation_based.functional as peer_functional
    import torchvision

    from scalesnn import functional

    T, N, size = args.T, args.batch_size, args.size
    x, y = static_images(T, N, size)
    x_last, _ = static_images(T, N, size, channels_last=True)
    ours, ours_last = make_ours(), make_ours().to(memory_format=torch.channels_last)
    peer, ann = make_spikingjelly(), torchvision.models.resnet18().to(memory_format=torch.channels_last)
    images = torch.randn(T * N, 3, size, size).contiguous(memory_format=torch.channels_last)

    def ann_step() -> None:
        ann.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(ann(images), y.repeat(T)).backward()

    contenders: dict[str, Callable[[], object]] = {
        "scalesnn_channels_last": lambda: training_step(ours_last, x_last, y, functional.reset_net),
        "spikingjelly": lambda: training_step(peer, x, y, peer_functional.reset_net),
        "scalesnn_contiguous": lambda: training_step(ours, x, y, functional.reset_net),
        "torchvision_resnet18_channels_last": ann_step,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        for _ in range(2):
            step()
    for _ in range(args.rounds):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        name: statistics.median(
            peer_s / own_s for peer_s, own_s in zip(times["spikingjelly"], times[name], strict=True)
        )
        for name in ("scalesnn_channels_last", "scalesnn_contiguous")
    }
    for name, seconds in median.items():
        print(f"{name:36} {seconds:.3f} s  (fastest {min(times[name]):.3f})")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} x as fast as SpikingJelly")
    save(
        "step_time",
        {"machine": machine(), "arguments": vars(args), "seconds": times, "times_as_fast": ratios},
    )


if __name__ == "__main__":
    main()
