"""The planner's bytes against the measured ones: resident memory of a training step on the CPU.

    python benchmarks/memory_plan.py

Each configuration is measured above the loaded model, in processes of its own: once with freed blocks given
back to the system at once (MALLOC_MMAP_THRESHOLD_), so that resident memory is what is alive, which is what
the planner counts; once as the Trainer sets it up (``memory.keep_freed_blocks``), which holds more.
Writes benchmarks/results/memory_plan.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import machine, make_ours, save

__all__ = ["CONFIGURATIONS", "main"]

CONFIGURATIONS = [
    (net, T, policy)
    for net, T, policies in (
        ("spiking_resnet18", 4, ("none", "layer", "block")),
        ("spiking_resnet18", 24, ("none", "block", "layer", "time:6")),
        ("spiking_resnet18", 64, ("time:8",)),
        ("spiking_resnet34", 8, ("none", "layer", "time:4")),
        ("spiking_resnet50", 8, ("none", "layer", "block", "time:4")),
    )
    for policy in policies
]


def predicted(net: str, T: int, N: int, size: int, policy: str) -> int:
    """Bytes of a step above the loaded model at the worst moment."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from scalesnn.memory import Policy
    from scalesnn.memory.planner import Planner

    mode = FakeTensorMode()
    with mode:
        model = make_ours(net)
    planner = Planner(model, (T, N, 3, size, size), 0, device_type="cpu", mode=mode)
    return planner.step_bytes(Policy.parse(policy))


def measured(net: str, T: int, policy: str, args: argparse.Namespace, give_back: bool) -> int:
    """Resident bytes of a step above the loaded model, in a process of its own."""
    flags = ["--net", net, "--T", str(T), "--batch-size", str(args.batch_size), "--size", str(args.size)]
    command = [sys.executable, str(Path(__file__).with_name("memory_peak.py")), *flags, "--timed", "0"]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if give_back else {})}
    done = subprocess.run(
        [*command, "--only", policy], capture_output=True, text=True, check=True, env=environment
    )
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    rows = []
    for net, T, policy in CONFIGURATIONS:
        alive, held = (measured(net, T, policy, args, give_back) for give_back in (True, False))
        plan = predicted(net, T, args.batch_size, args.size, policy)
        row = {"net": net, "T": T, "policy": policy, "predicted": plan, "measured": alive}
        rows.append({**row, "error": plan / alive - 1, "held": held, "held_over_alive": held / alive - 1})
        print(
            f"{net:18} T = {T:3} {policy:14} predicted {plan / 2**20:6.0f} MiB, measured "
            f"{alive / 2**20:6.0f} MiB, error {100 * rows[-1]['error']:+.1f} %; "
            f"held {held / 2**20:.0f} MiB",
            flush=True,
        )
        save("memory_plan", {"machine": machine(), "arguments": vars(args), "configurations": rows})


if __name__ == "__main__":
    main()
