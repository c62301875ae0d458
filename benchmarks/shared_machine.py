"""How OpenMP's wait policy and other processes change the time of a training step on the CPU.

    python benchmarks/shared_machine.py --busy 0 1

spiking_resnet18 on the shipped sample's sizes (28 × 28, T = 4, 32 images), all cores, beside ``--busy``
processes that compute without end. Contenders, in turn, each in a process of its own: libgomp as it comes
(threads spin at the end of a parallel region), OMP_WAIT_POLICY=passive (they sleep), what
``scalesnn.threads`` chooses at the start of a training, and one thread. Writes
benchmarks/results/shared_machine.json: wall-clock and CPU seconds of every step, and medians of the ratios of
a round to libgomp as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from common import machine, make_ours, save, static_images, training_step

from scalesnn.threads import choose_wait_policy

SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "chosen": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CLEAN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def measure(steps: int) -> list[tuple[float, float]]:
    """Seconds (wall, CPU) of every step after two that warm up."""
    from scalesnn import functional

    model = make_ours(num_classes=10)
    x, y = static_images(4, 32, 28)
    times = []
    for _ in range(2 + steps):
        wall, cpu = time.perf_counter(), time.process_time()
        training_step(model, x, y % 10, functional.reset_net)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times[2:]


def compare(busy: int, rounds: int, steps: int) -> dict[str, dict[str, object]]:
    """All contenders in turn beside ``busy`` processes."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    found: dict[str, list[list[list[float]]]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(rounds):
            for name, settings in SETTINGS.items():
                environ = {key: value for key, value in os.environ.items() if key not in CLEAN} | settings
                if name == "chosen":
                    choose_wait_policy(environ)
                command = [sys.executable, __file__, "--only", "--steps", str(steps)]
                done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        for process in others:
            process.kill()
            process.wait()
    report: dict[str, dict[str, object]] = {}
    for name, of_rounds in found.items():
        ratios = []
        for clock in (0, 1):
            own, base = (
                [statistics.median(step[clock] for step in steps) for steps in values]
                for values in (of_rounds, found["as it comes"])
            )
            ratios.append(statistics.median(o / b for o, b in zip(own, base, strict=True)))
        report[name] = {"wall_ratio": ratios[0], "cpu_ratio": ratios[1], "seconds": of_rounds}
        print(f"{busy} busy, {name:12} wall {ratios[0]:.2f} x, CPU {ratios[1]:.2f} x", flush=True)
    return report


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="busy processes beside it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.steps)))
        return
    results = {busy: compare(busy, args.rounds, args.steps) for busy in args.busy}
    record = {"machine": machine(), "arguments": vars(args), "load": os.getloadavg()[0], "busy": results}
    save("shared_machine", record)


if __name__ == "__main__":
    main()
