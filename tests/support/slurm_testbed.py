"""The Slurm of tests/cluster/testbed.sh as tests use it, and short trainings for it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import scalesnn

ROOT = Path(scalesnn.__file__).resolve().parents[1]
SAMPLE = ROOT / "scalesnn/data/sample/fashion-mnist"
TESTBED = ROOT / "tests/cluster/testbed.sh"
SYSTEM_PATH = "/usr/sbin:/sbin"

os.environ["PATH"] += f":{SYSTEM_PATH}"


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until ``condition`` gives something true; fail with ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.2)
    pytest.fail(f"after {seconds:.0f} s: not {what}")


class Slurm:
    """The testbed as tests use it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        environ = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "SCALESNN_"))
        }
        for name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "LOCAL_SIZE",
            "GLOO_SOCKET_IFNAME",
        ):
            environ.pop(name, None)  # what a test in this process may have exported
        self.environ = {
            **environ,
            "PORT": str(port),
            "OWNER": str(os.getpid()),  # the daemons end with this process, also if it is killed
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *words: str, timeout: float = 60, **settings: Any) -> subprocess.CompletedProcess[str]:
        """A command with this Slurm."""
        return subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, env=self.environ, **settings
        )

    def submit(self, *words: str, cwd: Path, **more: str) -> str:
        """sbatch; returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words], capture_output=True, text=True, timeout=60, cwd=cwd,
            env={**self.environ, **more},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """scontrol's fields of a job."""
        text = self.run("scontrol", "show", "job", job, "--oneliner").stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: str, seconds: float) -> dict[str, str]:
        """The fields of a job that has ended."""

        def ended() -> dict[str, str] | None:
            fields = self.show(job)
            over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            return fields if fields.get("JobState") in over else None

        return wait_until(ended, seconds, f"ended: {self.show(job)}")


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below the ephemeral ones."""
    for first in range(17000 + os.getpid() % 1000 * 5, 30000, 5):
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


def training_flags(images: Path, output: Path, *more: str) -> list[str]:
    """A training of 16 steps of 8 images on two ranks (4 epochs), in a few seconds."""
    return [
        "--config", str(ROOT / "configs/recipes/sample.yaml"), "--data-path", str(images), "--T", "2",
        "--epochs", "4", "--batch-size", "4", "--lr", "0.01", "--workers", "0", "--metrics-every", "1",
        "--wandb", "disabled", "--output-dir", str(output), *more,
    ]  # fmt: skip


def trace(folder: Path) -> dict[int, float]:
    """The loss of each step of a run; a step that was repeated must have come to the same value."""
    losses: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            assert losses.setdefault(record["step"], record["loss"]) == record["loss"]
    return losses


def steps_so_far(folder: Path) -> int:
    """The newest step in metrics.jsonl; 0 before there is one."""
    try:
        return max(trace(folder), default=0)
    except (OSError, ValueError):
        return 0
