"""A real training, resumed, and what it leaves in W&B's own file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalesnn.tracking.jsonl import read_jsonl
from scalesnn.tracking.report import write_report
from scalesnn.tracking.wandb_log import read_history, read_records

ROOT = Path(__file__).parents[2]

EVERY_METRIC = {
    *("train/loss", "train/acc1", "train/acc5", "train/lr", "train/grad_norm", "train/checkpoint_s"),
    *("train/images_per_s", "train/images_per_s_per_device", "train/compute_images_per_s"),
    *("train/time_steps_per_s", "train/data_wait_s", "train/step_s", "train/device_hours"),
    *("train/tflops_per_device", "time/forward_s", "time/backward_s", "time/optimizer_s"),
    *("time/communication_s", "memory/peak_bytes"),
    *("spikes/firing_rate", "spikes/dead_share", "spikes/saturated_share"),
    *("spikes/layer1.0.sn1/firing_rate", "spikes/layer1.0.sn1/firing_rate_t/t0"),
    *("spikes/layer1.0.sn1/firing_rate_t/t1", "spikes/layer4.1.sn2/dead_share"),
    *("spikes/layer4.1.sn2/saturated_share", "membrane/sn1/mean", "membrane/sn1/std"),
    *("membrane/sn1/active_share", "gradient_norm/conv1", "gradient_norm/layer4.1.conv2"),
    *("energy/synops_per_image", "energy/snn_mj_per_image", "energy/ann_mj_per_image"),
    *("train_loss", "train_acc1", "train_acc5", "test_loss", "test_acc1", "test_acc5"),
}


def train(folder: Path, steps: int, *more: str) -> None:
    """launch/train.py on the shipped images up to step ``steps``."""
    command = [sys.executable, "launch/train.py", "--config", "configs/recipes/sample.yaml", "--T", "2"]
    command += ["--batch-size", "8", "--max-steps", str(steps), "--output-dir", str(folder), "-j", "1"]
    command += [
        "--metrics-every",
        "1",
        "--spike-metrics-every",
        "2",
        "--save-every",
        "2",
        "--wandb",
        "offline",
    ]
    done = subprocess.run(
        [*command, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_wandb_file_of_a_resumed_training_holds_every_metric_of_every_step_once(tmp_path: Path) -> None:
    train(tmp_path / "runs", 3)
    train(tmp_path / "runs", 6, "--resume", "latest")
    (run,) = (tmp_path / "runs").iterdir()
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    rows = read_history(file)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert set().union(*rows) >= EVERY_METRIC
    written = [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == "step"]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [r["loss"] for r in written]
    assert written[-1]["images_seen"] == 48
    config = next(r.run.config for r in read_records(file) if r.WhichOneof("record_type") == "run")
    assert any(item.key == "settings" and '"lr"' in item.value_json for item in config.update)
    assert write_report([run], tmp_path / "report").stat().st_size > 20_000
