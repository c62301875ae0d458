"""Peak resident memory above the loaded model and CPU time of one fp32 training step on the CPU:
spiking_resnet18 of scalesnn under several policies, and SpikingJelly 2.0.0's, plain and with its memopt.

    python benchmarks/memory_peak.py --T 16 --batch-size 2 --size 128

Every measurement is a process of its own, set up as users have it: SpikingJelly with the C library's
allocator as it is, scalesnn with the arena that its Trainer takes (``memory.use_arena``). With --give-back
freed blocks go back to the system at once in both, so that resident memory is what is alive (and every step
is slow). Rounds go round all contenders, and the least counts.
Writes benchmarks/results/memory_peak_T16.json.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from common import (
    in_turn,
    machine,
    make_ours,
    make_spikingjelly,
    peak_above,
    save,
    static_images,
    training_step,
)

__all__ = ["main", "measure"]

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back to the system


def contender(name: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """The net and its reset function."""
    if name.startswith("spikingjelly"):
        from spikingjelly.activation_based import functional as peer

        model = make_spikingjelly(args.net)
        if name.endswith("memopt"):
            from spikingjelly.activation_based import memopt
            from spikingjelly.activation_based.model.spiking_resnet import BasicBlock

            x, _ = static_images(args.T, args.batch_size, args.size)
            model = memopt.optimize_memory(model, BasicBlock, lambda net: net(x), level=1)
            peer.reset_net(model)
        return model, peer.reset_net
    from scalesnn import functional
    from scalesnn.memory import apply_policy

    model = make_ours(args.net).to(memory_format=torch.channels_last)
    return apply_policy(model, name), functional.reset_net


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak bytes above the model, seconds and CPU seconds of a training step; the first, small, warms up."""
    from scalesnn.memory import use_arena

    ours = not name.startswith("spikingjelly")
    if ours:
        use_arena()
    model, reset = contender(name, args)
    warm_x, warm_y = static_images(4, 1, 32, channels_last=ours)
    training_step(model, warm_x, warm_y, reset)
    model.zero_grad(set_to_none=True)
    x, y = static_images(args.T, args.batch_size, args.size, channels_last=ours)
    peak = peak_above(lambda: training_step(model, x, y, reset))
    seconds, cpu_seconds = [], []
    for _ in range(args.timed):
        start, cpu_start = time.perf_counter(), time.process_time()
        training_step(model, x, y, reset)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {"peak": peak, "seconds": min(seconds, default=0.0), "cpu_seconds": min(cpu_seconds, default=0.0)}


def main() -> None:
    """Measure all, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="spiking_resnet18")
    parser.add_argument("--T", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timed", type=int, default=5, help="timed steps a process")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=[
            "spikingjelly",
            "spikingjelly memopt",
            "none",
            "layer",
            "block",
            "time:4",
            "layer+time:4",
        ],
    )
    parser.add_argument("--give-back", action="store_true", help="freed blocks go back at once")
    parser.add_argument("--only", help="measure one in this process")
    parser.add_argument("--name", help="of the results file")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results = in_turn(__file__, args.contenders, args.rounds, GIVE_BACK if args.give_back else None)
    record: dict[str, Any] = {"machine": machine(), "arguments": vars(args), "contenders": {}}
    best = {
        name: {key: min(v[key] for v in values) for key in ("peak", "seconds", "cpu_seconds")}
        for name, values in results.items()
        if values
    }
    plain = best.get("spikingjelly")
    for name, value in best.items():
        row: dict[str, Any] = {**value, "rounds": results[name]}
        text = f"{name:22} {value['peak'] / 2**20:7.0f} MiB {value['seconds']:7.2f} s"
        if plain:
            row["peak_ratio"] = value["peak"] / plain["peak"]
            row["time_ratio"] = value["seconds"] / max(plain["seconds"], 1e-9)
            text += f"   {row['peak_ratio']:.2f} × the memory, {row['time_ratio']:.2f} × the time"
        record["contenders"][name] = row
        print(text + (" of SpikingJelly's" if plain else ""))
    save(args.name or f"memory_peak_T{args.T}", record)


if __name__ == "__main__":
    main()
