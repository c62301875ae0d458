"""Peak resident memory above the loaded model and CPU time of one fp32 training step on the CPU:
spiking_resnet18 of scalesnn under several policies, and SpikingJelly 2.0.0's, plain and with its memopt.

    python benchmarks/memory_peak.py --T 16 --batch-size 2 --size 128

Every measurement is a process of its own, in two settings. First freed blocks are given back to the system at
once: resident memory is what is alive. Then all are as users have them (SpikingJelly with the C library
as it is, scalesnn with ``memory.keep_freed_blocks``, as its Trainer sets it): for the time, and for what the
process holds. Rounds go round all contenders, and the least counts.
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
    from scalesnn.memory import keep_freed_blocks

    ours = not name.startswith("spikingjelly")
    if ours:
        keep_freed_blocks(frugal=name != "none")
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
            "time:8",
        ],
    )
    parser.add_argument("--only", help="measure one in this process")
    parser.add_argument("--name", help="of the results file")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    record: dict[str, Any] = {"machine": machine(), "arguments": vars(args), "contenders": {}}
    alive, held = (in_turn(__file__, args.contenders, args.rounds, env) for env in (GIVE_BACK, None))
    for name in args.contenders:
        if not alive[name] or not held[name]:
            continue
        row: dict[str, Any] = {
            "peak": min(v["peak"] for v in alive[name]),
            "held": min(v["peak"] for v in held[name]),
            **{key: min(v[key] for v in held[name]) for key in ("seconds", "cpu_seconds")},
            "rounds": {"alive": alive[name], "held": held[name]},
        }
        record["contenders"][name] = row
        plain = record["contenders"].get("spikingjelly", row)
        for key in ("peak", "held", "seconds", "cpu_seconds"):
            row[f"{key}_ratio"] = row[key] / max(plain[key], 1e-9)
        for key, scale, unit in (
            ("peak", 2**20, "MiB alive"),
            ("held", 2**20, "held"),
            ("cpu_seconds", 1, "s"),
        ):
            print(f"{name} {row[key] / scale:.2f} {unit} ({row[f'{key}_ratio']:.2f} ×)", end=", ")
        print(f"{row['seconds']:.2f} s by the clock")
    save(args.name or f"memory_peak_T{args.T}", record)


if __name__ == "__main__":
    main()
