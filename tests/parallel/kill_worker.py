"""Kill a training run at random moments, many times over: ``python kill_worker.py FOLDER KILLS SEED``.

Each run is a fork of this process, so that a life costs milliseconds. It trains from the newest checkpoint,
logs what it did, and is killed: every second time while a checkpoint is being written (its folder for
unfinished checkpoints is there), else at any moment. The disk is made slow, so that writing takes a good
part of the time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalesnn.parallel import Topology
from scalesnn.parallel.single import SingleStrategy
from scalesnn.training.checkpoint import CheckpointManager, Progress
from scalesnn.training.ema import ModelEma

STEPS, EVERY = 60, 3


class Flags:
    """What a strategy reads of the command line."""

    gradient_accumulation = 1
    clip_grad_norm = None
    sync_bn = False
    on_nan = "stop"


def slow_disk() -> None:
    """Let every fsync take a few milliseconds."""
    real = os.fsync

    def fsync(handle: int) -> None:
        time.sleep(0.004)
        real(handle)

    os.fsync = fsync


def life(folder: Path, log: Path, background: bool) -> None:
    """Train to the end, from wherever the last life came to."""
    torch.manual_seed(3)
    strategy = SingleStrategy(Flags(), Topology())
    strategy.setup_device("cpu")
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.2), nn.Flatten(), nn.Linear(96, 3)
    )
    strategy.prepare(
        net,
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    )
    ema = ModelEma(strategy, 0.9)
    manager = CheckpointManager(folder, strategy, keep=2, ema=ema, background=background)
    progress = manager.load("latest")[0] if manager.latest() else Progress()
    with log.open("a") as file:

        def note(*words: Any) -> None:
            print(json.dumps(words), file=file, flush=True)

        note("start", progress.step)
        while progress.step < STEPS:
            generator = torch.Generator().manual_seed(progress.step)
            x = torch.randn(8, 3, 6, 6, generator=generator)
            loss = nn.functional.cross_entropy(strategy.model(x), torch.arange(8) % 3)
            strategy.backward(loss)
            strategy.step()
            progress.step += 1
            ema.update(progress.step)
            note("step", progress.step, loss.item())
            if progress.step % 10 == 0:
                strategy.end_epoch()
            if progress.step % EVERY == 0:
                manager.save(progress, extra={}, is_best=progress.step % 9 == 0)
                note("saved", progress.step)
        manager.wait()
        state = strategy.full_model_state()
        note("end", sum(v.double().square().sum().item() for v in state.values()))


def lines(log: Path) -> int:
    """How many lines the log has."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_lines(child: int, log: Path, count: int) -> None:
    """Wait until the log has ``count`` lines, or the child has ended."""
    while lines(log) < count and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.002)


def is_writing(folder: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after ``since``."""
    for path in folder.glob(".writing_*"):
        try:
            if path.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # it was renamed just now: complete
            continue
    return False


def main(target: str, kills: str, seed: str) -> None:
    """Run lives until ``kills`` of them were killed, then one to the end."""
    folder, log = Path(target) / "checkpoints", Path(target) / "log"
    draw = random.Random(int(seed))
    slow_disk()
    count = amid_writing = 0
    background = seed.endswith("7")
    while True:
        born = time.time()
        child = os.fork()
        if child == 0:
            try:
                life(folder, log, background)
                os._exit(0)
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
                os._exit(1)
        if count >= int(kills):
            _, status = os.waitpid(child, 0)
            print(json.dumps({"kills": count, "amid_writing": amid_writing, "status": status}))
            return
        wait_for_lines(child, log, lines(log) + draw.randint(4, 16))
        deadline = time.monotonic() + 2
        while count % 2 == 0 and not is_writing(folder, born) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02))
        writing = is_writing(folder, born)
        try:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            status = 0
        if os.WIFSIGNALED(status):
            count += 1
            amid_writing += writing
        elif log.exists() and '"end"' in log.read_text():  # it came to its end first: begin again
            os.rename(folder, folder.with_name(f"done_{count}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
