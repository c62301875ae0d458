"""A whole training run against SpikingJelly 0.0.0.0.14's, from start-up to evaluation.

    python benchmarks/whole_run.py            (about 25 minutes on 2 cores)

The old trainer is installed into a folder of its own and runs on this environment's torch, with the same
flags on the same images (mixup and cutmix off: with its defaults it crashes in the loss). The two run in
turn, every round with a seed of its own; the claim is the median of the ratios, and the mean test accuracies
beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, save

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "scalesnn/data/sample/fashion-mnist"
PEER = "spikingjelly==0.0.0.0.14"
FIRST_SEED = 2020  # the default of both
MODULES = {
    "scalesnn": "scalesnn.model.train_imagenet_example",
    "spikingjelly 0.0.0.0.14": "spikingjelly.activation_based.model.train_imagenet_example",
}


def install_peer(folder: Path) -> None:
    """The old release alone, beside this environment's torch."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--target", folder, PEER], check=True)


def run(name: str, peer: Path, output: Path, epochs: int, data: str, seed: int) -> tuple[float, float]:
    """One run: (seconds, test top-1 in per cent)."""
    flags = (
        f"--T 4 --model spiking_resnet18 --data-path {data} --batch-size 32 --epochs {epochs} --lr 0.05 "
        f"--lr-warmup-epochs 1 --mixup-alpha 0 --cutmix-alpha 0 --auto-augment ta_wide --random-erase 0.1 "
        "--train-crop-size 28 --val-resize-size 28 --val-crop-size 28 --workers 1 --device cpu --disable-amp "
        f"--disable-uda --seed {seed} --output-dir {output}"
    )
    own = name == "scalesnn"
    paths = [str(ROOT)] if own else [str(peer)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled"}
    start = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", MODULES[name], *flags.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    if own:
        (metrics,) = output.glob("*/metrics.jsonl")
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        accuracy = [r["acc1"] for r in records if r["kind"] == "epoch" and r["split"] == "test"][-1]
    else:
        accuracy = float(re.findall(r"test_acc1=([\d.]+)", done.stdout)[-1])
    return seconds, accuracy


def main() -> None:
    """Run both in turn and write benchmarks/results/whole_run.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first round")
    parser.add_argument("--epochs", type=int, default=6, help="three differ by ten points from seed to seed")
    parser.add_argument("--data-path", default=str(SAMPLE))
    args = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in MODULES}
    with tempfile.TemporaryDirectory() as folder:
        peer = Path(folder) / "peer"
        install_peer(peer)
        for number in range(args.rounds):
            for place, name in enumerate(MODULES):
                output = Path(folder) / f"{number}-{place}"
                results[name].append(run(name, peer, output, args.epochs, args.data_path, args.seed + number))
                print(name, "{:.1f} s, test top-1 {:.1f} %".format(*results[name][-1]), flush=True)
    own, other = (results[name] for name in MODULES)
    ratios = [b[0] / a[0] for a, b in zip(own, other, strict=True)]
    result = {
        "machine": machine(),
        "arguments": vars(args),
        "seconds": {name: [seconds for seconds, _ in rows] for name, rows in results.items()},
        "test_acc1": {name: [accuracy for _, accuracy in rows] for name, rows in results.items()},
        "mean_test_acc1": {
            name: statistics.mean(accuracy for _, accuracy in rows) for name, rows in results.items()
        },
        "times_as_fast": statistics.median(ratios),
    }
    save("whole_run", result)
    print(f"{result['times_as_fast']:.2f} times as fast; mean test top-1 {result['mean_test_acc1']}")


if __name__ == "__main__":
    main()
