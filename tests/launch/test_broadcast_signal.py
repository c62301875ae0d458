"""Slurm's SIGTERM reaches all processes of a job at once: the loader's must not pull the training down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import scalesnn

ROOT = Path(scalesnn.__file__).resolve().parents[1]


@pytest.mark.distributed
def test_a_signal_to_all_processes_still_saves(tmp_path):
    flags = ["--config", str(ROOT / "configs/recipes/sample.yaml"), "--T", "2", "--batch-size", "4",
             "--workers", "2", "--loader", "torchvision", "--metrics-every", "1", "--wandb", "disabled",
             "--output-dir", str(tmp_path), "--run-name", "run"]  # fmt: skip
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("SLURM_")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/train.py"), *flags],
        env={**environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + 150
    while time.monotonic() < end and (not metrics.exists() or metrics.read_text().count("\n") < 2):
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    for pid in [*(worker.pid for worker in workers), process.pid]:
        os.kill(pid, signal.SIGTERM)
    out = process.communicate(timeout=100)[0]
    assert workers
    assert process.returncode == 128 + signal.SIGTERM, out[-3000:]
    mark = json.loads((tmp_path / "run/interrupted.json").read_text())
    assert (tmp_path / f"run/checkpoints/step_{mark['step']:08}").is_dir()
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)
