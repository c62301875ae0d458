"""Every strategy beside plain DDP: step time, memory of a rank, optimizer state of a rank, checkpoint speed.

    python benchmarks/strategies.py [--ranks 2] [--steps 12] [--net spiking_resnet18] [--size 32] [--batch 8]

All strategies train the same net in the same processes, in turns (one step each, round after round), so that
whatever else the machine does meets all of them alike. Results: benchmarks/results/strategies.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine, make_ours, save
from scalesnn import functional
from scalesnn.parallel import Topology, add_parallel_arguments, create_strategy
from scalesnn.parallel.topology import free_port
from scalesnn.training.checkpoint import CheckpointManager, Progress

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STRATEGIES = {
    "ddp": [],
    **{f"zero{stage}": ["--deepspeed_config", str(CONFIGS / f"zero{stage}.json")] for stage in range(4)},
    "fsdp": ["--fsdp-config", str(CONFIGS / "fsdp.yaml")],
}


def parse_strategy(words: list[str], batch: int) -> argparse.Namespace:
    """The parallel flags, with the settings of others that strategies read."""
    parser = argparse.ArgumentParser()
    add_parallel_arguments(parser)
    args = parser.parse_args(words)
    others = {"batch_size": batch, "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "disable_amp": False}
    for name, value in others.items():
        setattr(args, name, value)
    args.explicit = set()
    return args


class Contender:
    """One strategy with its net."""

    def __init__(self, name: str, options: argparse.Namespace, topology: Topology) -> None:
        before = psutil.Process().memory_info().rss
        self.strategy = create_strategy(parse_strategy(STRATEGIES[name], options.batch), topology)
        self.device = self.strategy.setup_device(options.device)
        torch.manual_seed(0)
        net = make_ours(options.net, num_classes=10)
        self.strategy.prepare(
            net,
            lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
            lambda o: torch.optim.lr_scheduler.StepLR(o, 10),
        )
        self.times: list[float] = []
        self.options = options
        shape = (options.T, options.batch, 3, options.size, options.size)
        self.images = torch.randn(shape, device=self.device)
        self.targets = torch.arange(options.batch, device=self.device) % 10
        self.step()
        self.before = before
        self.peak = 0
        self.times.clear()

    def step(self) -> None:
        """One step, timed."""
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with self.strategy.autocast():
            loss = nn.functional.cross_entropy(self.strategy.model(self.images).mean(0), self.targets)
        self.strategy.backward(loss)
        functional.reset_net(self.strategy.module)
        self.strategy.step()
        if gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.times.append(time.perf_counter() - start)

    def report(self, folder: Path) -> dict[str, Any]:
        """The figures of this rank."""
        shards = self.strategy.optimizer_shards()
        manager = CheckpointManager(folder, self.strategy)
        speeds = []
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before
        for step in (1, 2, 3):
            self.strategy.barrier()
            start = time.perf_counter()
            path = manager.save(Progress(step=step))
            speeds.append(time.perf_counter() - start)
        size = sum(f.stat().st_size for f in path.iterdir())
        start = time.perf_counter()
        manager.load(path)
        load = time.perf_counter() - start
        return {
            "step_s": statistics.median(self.times),
            "peak_memory_MB": peak / 1e6,
            "gpu_peak_MB": self.peak / 1e6 or None,
            "optimizer_values_of_rank": sum(s.values.numel() for s in shards.values()),
            "checkpoint_MB": size / 1e6,
            "save_MB_per_s": size / 1e6 / statistics.median(speeds),
            "load_MB_per_s": size / 1e6 / load,
        }


def run_rank(options: argparse.Namespace) -> None:
    """Be one rank."""
    topology = Topology.from_environment()
    names = [name for name in options.strategies.split(",") if name]
    contenders = {name: Contender(name, options, topology) for name in names}
    for _ in range(options.steps):
        for contender in contenders.values():
            contender.step()
    figures = {n: c.report(Path(options.folder) / n) for n, c in contenders.items()}
    if topology.rank == 0:
        Path(options.folder, "figures.json").write_text(json.dumps(figures))
        Path(options.folder, "machine.json").write_text(json.dumps(machine(contenders[names[0]].device)))
    os._exit(0)  # several engines in one process have no common way to close


def run_ranks(
    options: argparse.Namespace, strategies: str, steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Start the ranks; returns rank 0's figures by strategy, and the machine."""
    folder = tempfile.mkdtemp(prefix="strategies")
    port = str(free_port())
    ranks = []
    words = [*sys.argv, "--strategies", strategies, "--steps", str(steps), "--folder", folder]
    for rank in range(options.ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": options.ranks, "MASTER_PORT": port}
        place |= {"LOCAL_WORLD_SIZE": options.ranks, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{k: str(v) for k, v in place.items()}}
        ranks.append(subprocess.Popen([sys.executable, *words], env=environment))
    try:
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}")
        figures = json.loads(Path(folder, "figures.json").read_text())
        where = json.loads(Path(folder, "machine.json").read_text())
    finally:
        for process in ranks:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return figures, where


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--net", default="spiking_resnet18")
    parser.add_argument("--T", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="images per rank")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--name", default="strategies", help="of the file with the results")
    parser.add_argument("--folder", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        run_rank(options)
        return
    figures, where = run_ranks(options, options.strategies, options.steps)
    for name in figures:  # memory: each alone in fresh processes
        alone, _ = run_ranks(options, name, 2)
        figures[name]["peak_memory_MB"] = alone[name]["peak_memory_MB"]
    base = figures.get("ddp", next(iter(figures.values())))["step_s"]
    print(f"{'strategy':<9}{'step':>10}{'to DDP':>8}{'peak':>9}{'optimizer':>12}{'save':>10}{'load':>10}")
    for name, found in figures.items():
        found["step_relative_to_ddp"] = found["step_s"] / base
        print(
            f"{name:<9}{found['step_s'] * 1e3:8.1f}ms{found['step_relative_to_ddp']:8.2f}"
            f"{found['peak_memory_MB']:7.0f}MB{found['optimizer_values_of_rank']:>12,}"
            f"{found['save_MB_per_s']:6.0f}MB/s{found['load_MB_per_s']:6.0f}MB/s"
        )
    settings = {k: v for k, v in vars(options).items() if k not in ("folder", "name")}
    save(options.name, {"machine": where, "settings": settings, "strategies": figures})


if __name__ == "__main__":
    main()
