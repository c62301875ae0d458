"""Images per second and CPU time per image: scalesnn's DALI loader against torchvision's DataLoader.

    python benchmarks/data_throughput.py [--rounds 5] [--images 1024] [--output FILE.json]

1,024 synthetic JPEGs of about 500 x 375 pixels and 75 KB are made in a temporary folder. Recipes:
``bare`` (random resized crop 176, flip, normalise), ``whole`` (with TrivialAugmentWide and random erasing),
and ``sample``, ``bare`` at crop 28 on the 6,000 images that ship with scalesnn. The peer is what a user of
torchvision writes: ImageFolder, transforms on Pillow images, DataLoader with two worker processes; scalesnn
has two DALI threads. Both run in turn, an epoch each, in every round, so that what else the machine does
meets both; the figures are medians over rounds, and the ratio is the median of the rounds' ratios. CPU time
is that of the process and its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from scalesnn.data.opening import SAMPLE

BATCH, WORKERS = 64, 2
RECIPES = {  # policy, probability of erasing, crop size
    "bare": ("none", 0.0, 176),
    "whole": ("ta_wide", 0.1, 176),
    "sample": ("none", 0.0, 28),
}


def make_images(root: Path, count: int) -> int:
    """Write ``count`` JPEGs below ``root`` and return their mean size in bytes."""
    draw = np.random.default_rng(0)
    canvas = np.zeros((900, 1200, 3))
    for scale in (1, 2, 4, 8, 16, 32, 64):  # detail of all sizes, as photographs have
        coarse = draw.normal(0, 6 + 5 * np.log2(scale + 1), (900 // scale + 1, 1200 // scale + 1, 3))
        canvas += coarse.repeat(scale, axis=0).repeat(scale, axis=1)[:900, :1200]
    canvas = np.clip(canvas + 127, 0, 255).astype(np.uint8)
    total = 0
    for number in range(count):
        height, width = (375, 500) if number % 4 else (500, 375)
        height, width = height + int(draw.integers(-30, 31)), width + int(draw.integers(-30, 31))
        top, left = int(draw.integers(0, 900 - height)), int(draw.integers(0, 1200 - width))
        for split in ("train", "val") if number < 8 else ("train",):
            file = root / split / f"class_{number % 8}" / f"{number:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(canvas[top : top + height, left : left + width]).save(file, quality=80)
            total += file.stat().st_size if split == "train" else 0
    return total // count


def torchvision_epochs(root: Path, policy: str, erase: float, crop: int) -> Callable[[], Iterator[Any]]:
    """The peer: torchvision's own classes only."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps: list[Any] = [transforms.RandomResizedCrop(crop, antialias=True), transforms.RandomHorizontalFlip()]
    if policy == "ta_wide":
        steps.append(transforms.TrivialAugmentWide(interpolation=transforms.InterpolationMode.BILINEAR))
    steps += [
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    if erase:
        steps.append(transforms.RandomErasing(erase))
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(root / "train"), transforms.Compose(steps)),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    return lambda: iter(loader)


def scalesnn_epochs(root: Path, policy: str, erase: float, crop: int) -> Callable[[], Iterator[Any]]:
    """The loader of a run with the flags that make the same recipe."""
    from scalesnn.data import add_data_arguments, open_data

    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    words = f"--auto-augment {policy} --random-erase {erase} --train-crop-size {crop} -j {WORKERS}"
    plain = "--mixup-alpha 0 --cutmix-alpha 0 --loader dali"
    args = parser.parse_args([*words.split(), *plain.split(), "--data-path", str(root)])
    loader = open_data(args, batch_size=BATCH, seed=0).train
    epochs = iter(range(10**9))
    return lambda: loader.epoch(next(epochs))


def cpu_seconds() -> float:
    """User and system time of this process and its children."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [here, *here.children(recursive=True)])


def run(epochs: Callable[[], Iterator[Any]]) -> tuple[float, float]:
    """One epoch: images per second, CPU milliseconds per image."""
    before, started, images = cpu_seconds(), time.perf_counter(), 0
    for batch, _ in epochs():
        images += len(batch)
    taken = time.perf_counter() - started
    return images / taken, (cpu_seconds() - before) / images * 1e3


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/data_throughput.json")
    args = parser.parse_args()
    import nvidia.dali
    import torchvision

    results: dict[str, Any] = {
        "claim": "DALI loader against torchvision's DataLoader, paired, batch 64, 2 threads",
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_before": os.getloadavg()[0],
        },
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "dali": nvidia.dali.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "images": args.images,
        "recipes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results["mean_bytes"] = make_images(root, args.images)
        for name, (policy, erase, crop) in RECIPES.items():
            images = SAMPLE if name == "sample" else root
            peers = {
                "torchvision": torchvision_epochs(images, policy, erase, crop),
                "dali": scalesnn_epochs(images, policy, erase, crop),
            }
            for epochs in peers.values():
                run(epochs)  # workers, pipelines and the file cache warm up
            rounds: dict[str, list[tuple[float, float]]] = {"torchvision": [], "dali": []}
            for number in range(args.rounds):
                for peer in sorted(peers, reverse=bool(number % 2)):
                    rounds[peer].append(run(peers[peer]))
            pairs = list(zip(rounds["dali"], rounds["torchvision"], strict=True))
            summary: dict[str, Any] = {
                peer: {
                    "images_per_s": statistics.median(speed for speed, _ in measured),
                    "cpu_ms_per_image": statistics.median(cost for _, cost in measured),
                    "rounds": [[round(speed, 1), round(cost, 3)] for speed, cost in measured],
                }
                for peer, measured in rounds.items()
            }
            summary["speed_ratio"] = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
            summary["cpu_ratio"] = statistics.median(theirs[1] / ours[1] for ours, theirs in pairs)
            results["recipes"][name] = summary
            print(
                f"{name:6} dali {summary['dali']['images_per_s']:.0f} images/s, "
                f"{summary['dali']['cpu_ms_per_image']:.2f} ms CPU; torchvision "
                f"{summary['torchvision']['images_per_s']:.0f} images/s, "
                f"{summary['torchvision']['cpu_ms_per_image']:.2f} ms CPU; "
                f"{summary['speed_ratio']:.2f} x the speed, {summary['cpu_ratio']:.2f} x less CPU",
                flush=True,
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
