"""What all tracking together costs: training steps with and without it, in turn, in one process.

    python benchmarks/tracking_overhead.py [--steps 400] [--batch-size 32] [--size 28] [--model NET]

Of every two steps one, drawn by lot, is tracked as launch/train.py does by default: the phases are timed,
the progress line is shown every step, every 10 tracked steps a record goes to the console, metrics.jsonl,
TensorBoard and W&B (offline), every 100 tracked steps the spikes, membranes, gradients and synaptic
operations of all layers are measured. The steps between them run bare. Other work on the machine meets both
kinds alike; CPU time (all threads of the process, and W&B's own process as well) is hardly touched by it, so
it carries the claim: less than 2 % of a step.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from common import machine, save
from torch.nn import functional as F

from scalesnn import functional, neuron, surrogate
from scalesnn.model import sew_resnet, spiking_resnet
from scalesnn.tracking import SpikeMonitor, StepTimer, Tracker, add_tracking_arguments, create_tracker


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="of each kind half")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=28, help="height and width of the images")
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--model", default="spiking_resnet18")
    add_tracking_arguments(parser)
    args = parser.parse_args()
    args.wandb = "offline"

    torch.manual_seed(0)
    make = getattr(spiking_resnet, args.model, None) or getattr(sew_resnet, args.model)
    model = make(num_classes=10, spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan())
    functional.set_step_mode(model, "m")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    images = torch.rand(args.batch_size, 3, args.size, args.size)
    batch = (images, torch.randint(10, (args.batch_size,)))

    with tempfile.TemporaryDirectory() as folder:
        config = {"settings": vars(args)}
        tracker = create_tracker(args, Path(folder), config, total_steps=args.steps // 2)
        timer, monitor = StepTimer(time_steps=args.T), SpikeMonitor(model, args.spike_metrics_every)
        timer.watch_communication(model)
        tracked = _Tracked(args, tracker, timer, monitor, model, optimizer, batch)
        for _ in range(3):  # compile, allocate
            bare_step(args, model, optimizer, batch)
        time.sleep(3.0)  # W&B has started
        mine = psutil.Process()
        wall: dict[bool, list[float]] = {True: [], False: []}
        cpu: dict[bool, list[float]] = {True: [], False: []}
        before = _children_cpu(mine)
        draw, with_tracking = random.Random(0), False
        for number in range(args.steps):
            with_tracking = draw.random() < 0.5 if number % 2 == 0 else not with_tracking
            began, began_cpu = time.perf_counter(), time.process_time()
            if with_tracking:
                tracked.step()
            else:
                bare_step(args, model, optimizer, batch)
            cpu[with_tracking].append(time.process_time() - began_cpu)
            wall[with_tracking].append(time.perf_counter() - began)
        beside = _children_cpu(mine) - before
        tracker.close()

    bare_cpu, tracked_cpu = sum(cpu[False]), sum(cpu[True])
    pairs = list(zip(wall[True], wall[False], strict=True))
    result = {
        "machine": machine(),
        "settings": {name: getattr(args, name) for name in ("model", "T", "batch_size", "size", "steps")},
        "metrics_every": args.metrics_every,
        "spike_metrics_every": args.spike_metrics_every,
        "bare_step_cpu_s": bare_cpu / len(cpu[False]),
        "tracked_step_cpu_s": tracked_cpu / len(cpu[True]),
        "overhead_cpu": tracked_cpu / bare_cpu - 1,
        "overhead_cpu_of_medians": statistics.median(cpu[True]) / statistics.median(cpu[False]) - 1,
        "wandb_process_cpu_of_step": beside / bare_cpu,
        "own_calls_of_step": tracked.own_s / sum(wall[True]),
        "bare_step_wall_s_median": statistics.median(wall[False]),
        "tracked_step_wall_s_median": statistics.median(wall[True]),
        "overhead_wall_median_of_pairs": statistics.median(mine / bare - 1 for mine, bare in pairs),
        "load_average": os.getloadavg()[0],
    }
    for name, value in result.items():
        print(f"{name:>28}: {value}")
    save("tracking_overhead", result)


def bare_step(
    args: argparse.Namespace, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: tuple
) -> None:
    """One training step that nobody watches."""
    images, targets = batch
    output = model(images.expand(args.T, *images.shape)).mean(0)
    F.cross_entropy(output, targets).backward()
    functional.reset_net(model)
    optimizer.step()
    optimizer.zero_grad()


class _Tracked:
    """The same step as launch/train.py tracks it. ``own_s`` is the time spent in calls of tracking alone."""

    def __init__(
        self,
        args: argparse.Namespace,
        tracker: Tracker,
        timer: StepTimer,
        monitor: SpikeMonitor,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: tuple,
    ) -> None:
        self.args, self.tracker, self.timer, self.monitor = args, tracker, timer, monitor
        self.model, self.optimizer, self.batch = model, optimizer, batch
        self.number = 0
        self.own_s = 0.0

    def step(self) -> None:
        """One step."""
        args, timer, monitor = self.args, self.timer, self.monitor
        self.number += 1
        for images, targets in timer.data([self.batch]):
            with timer.phase("forward"), monitor.watch(self.number):
                output = self.model(images.expand(args.T, *images.shape)).mean(0)
                loss = F.cross_entropy(output, targets)
            with timer.phase("backward"):
                loss.backward()
                functional.reset_net(self.model)
                monitor.take_gradients(self.number, self.norms)
            with timer.phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            began = time.perf_counter()
            place = {"step": self.number, "epoch": 0, "loss": loss.detach()}
            if self.number % args.metrics_every == 0:
                record = {**place, **timer.read(), **monitor.read()}
                timer.flops_per_image = monitor.training_flops_per_image
                self.tracker.log_step(record)
                place = record
            self.tracker.progress(place)
            self.own_s += time.perf_counter() - began

    def norms(self) -> dict[str, torch.Tensor]:
        """Norms of the weights' gradients, as ``Strategy.gradient_norms`` gives them."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.dim() > 1}
        return dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))


def _children_cpu(process: psutil.Process) -> float:
    times = [child.cpu_times() for child in process.children(recursive=True)]
    return sum(item.user + item.system for item in times)


if __name__ == "__main__":
    main()
