"""Whole runs of the Trainer on real files: what they leave, what they refuse, and that nothing is lost."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from small_runs import ROOT, command, environment, records, run, trace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """The output folder of 20 steps in one go, with what the run printed in stdout.txt."""
    output = tmp_path_factory.mktemp("unbroken")
    words = ["--data-path", images, "--output-dir", output, "--max-steps", 20, "--save-every", 5]
    result = run(*words, "--resume", "latest")  # of which there is none
    assert result.returncode == 0, result.stderr
    (output / "stdout.txt").write_text(result.stdout)
    return output


def test_a_run_leaves_config_metrics_curves_and_checkpoints(unbroken):
    (folder,) = [p for p in unbroken.iterdir() if p.is_dir()]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["settings"]["max_steps"] == 20
    assert config["neurons"][0]["type"] == "IFNode"
    assert config["versions"]["torch"]
    assert sorted(trace(unbroken)) == list(range(1, 21))
    step = records(unbroken, "step")[-1]
    assert {"step", "epoch", "split", "loss", "acc1", "acc5", "lr", "images_per_s", "data_wait_s"} <= set(
        step
    )
    epochs = records(unbroken, "epoch", "test")
    assert [r["step"] for r in epochs] == [8, 16, 20]
    assert {"loss", "acc1", "acc5"} <= set(epochs[0])
    curves = EventAccumulator(str(folder / "tb"))
    curves.Reload()
    tags = {"train_acc1", "train_acc5", "train_loss", "test_acc1", "test_acc5", "test_loss"}
    assert tags <= set(curves.Tags()["scalars"])
    assert any((folder / "checkpoints").iterdir())


def test_a_start_prints_a_summary_and_the_whole_net_goes_to_a_file(unbroken):
    (folder,) = [p for p in unbroken.iterdir() if p.is_dir()]
    printed = (unbroken / "stdout.txt").read_text().splitlines()
    start = printed[: next(i for i, line in enumerate(printed) if line.startswith("epoch 1"))]
    assert len(start) < 30
    assert re.match(r" layer4 +512 × 1 × 1 +8,393,728 +[\d,]+ +[\d.]+ \w?i?B$", start[7])
    facts = dict(line.split(maxsplit=1) for line in start if len(line.split()) > 1)
    assert {"batch", "backend", "loader", "strategy", "devices", "precision"} <= set(facts)
    assert facts["run"].startswith(str(folder))
    assert "(conv1): Conv2d" in (folder / "model.txt").read_text()


def test_killed_and_resumed_is_the_unbroken_run(unbroken, images, tmp_path):
    words = ["--data-path", images, "--output-dir", tmp_path, "--max-steps", 20, "--save-every", 5]
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if list(tmp_path.glob("*/metrics.jsonl")) and len(trace(tmp_path)) >= 12:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(trace(tmp_path)) < 20, "the run ended before it was killed"
    result = run(*words, "--resume", "latest")
    assert result.returncode == 0, result.stderr
    assert trace(tmp_path) == pytest.approx(trace(unbroken), rel=1e-6)
    whole, broken = records(unbroken, "epoch"), records(tmp_path, "epoch")
    assert [(r["split"], r["step"]) for r in broken] == [(r["split"], r["step"]) for r in whole]
    assert [r["loss"] for r in broken] == pytest.approx([r["loss"] for r in whole], rel=1e-6)


def signal_all(pid: int, sent: signal.Signals) -> None:
    """Signal a process and all that it has started, as DeepSpeed's launcher and scancel do."""
    process = psutil.Process(pid)
    for child in [*process.children(recursive=True), process]:
        child.send_signal(sent)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(unbroken, images, tmp_path, sent):
    words = ["--data-path", images, "--output-dir", tmp_path, "--max-steps", 20, "--wandb=offline"]
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not list(tmp_path.glob("*/metrics.jsonl")) or not trace(tmp_path):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    while not list(tmp_path.glob("*/wandb/*/*.wandb")):
        time.sleep(0.02)
    signal_all(process.pid, sent)
    printed, _ = process.communicate(timeout=60)
    assert "Traceback" not in printed
    assert "W&B is switched off" in printed  # its service process had the signal as well
    assert process.returncode == 128 + sent
    assert "--resume latest" in printed
    stopped_at = max(trace(tmp_path))
    assert stopped_at < 20
    if sent == signal.SIGINT:  # the resume that follows is the same
        return
    result = run(*words, "--resume", "latest")
    assert result.returncode == 0, result.stderr
    assert trace(tmp_path) == pytest.approx(trace(unbroken), rel=1e-6)


def test_resume_latest_with_nothing_there_starts_fresh_and_says_so(unbroken):
    assert "starts fresh" in (unbroken / "stdout.txt").read_text()


def test_test_only_prints_the_figures_of_a_checkpoint(unbroken, images, tmp_path):
    checkpoint = next(p for p in unbroken.glob("*/checkpoints/step_*20"))
    result = run("--data-path", images, "--output-dir", tmp_path, "--test-only", "--resume", checkpoint)
    assert result.returncode == 0, result.stderr
    expected = records(unbroken, "epoch", "test")[-1]
    assert f"{expected['acc1']:.2f}" in result.stdout


@pytest.mark.distributed
def test_deepspeed_s_launcher_starts_two_ranks_and_zero_3_trains_on_after_an_evaluation(images, tmp_path):
    prefix = ["deepspeed", "--master_port", str(20000 + os.getpid() % 20000), "--num_gpus", "2"]
    words = ["--data-path", images, "--output-dir", tmp_path, "--max-steps", 3, "--batch-size", 8]
    words += ["--deepspeed_config", ROOT / "configs/zero3.json"]
    result = run(*words, prefix=prefix, timeout=200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert len(trace(tmp_path)) == 3  # two steps an epoch
    (config,) = tmp_path.glob("*/config.yaml")
    assert yaml.safe_load(config.read_text())["world_size"] == 2


def test_log_files_have_no_control_characters(unbroken):
    printed = (unbroken / "stdout.txt").read_text()
    assert "loss" in printed
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", printed)


def test_a_signal_before_the_run_can_save_waits_until_it_can(images, tmp_path):
    """SIGUSR1 while torch is imported: without the entry's mask it would kill the process."""
    process = subprocess.Popen(
        command("--data-path", images, "--output-dir", tmp_path, "--loader", "torchvision"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    bit = 1 << (signal.SIGUSR1 - 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if int(re.search(r"SigBlk:\s+(\w+)", status.read_text())[1], 16) & bit:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1, said
    assert "SIGUSR1: ended before the first step in" in said
