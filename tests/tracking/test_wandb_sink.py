"""W&B: one id and one whole history, whatever happens to processes and networks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from scalesnn.tracking.wandb_log import read_history, read_records
from scalesnn.tracking.wandb_sink import run_id_of, write_offline_run

A_RUN = Path(__file__).with_name("a_run.py")
STEPS_PER_EPOCH = 4


def train(run: Path, first: int, last: int, *more: str, end: str = "finished", wandb: str = "offline") -> str:
    """Steps first + 1 … last of a run in a process of its own; what it printed."""
    command = [sys.executable, str(A_RUN), str(run), "--wandb", wandb, "--end", end]
    done = subprocess.run(
        [*command, "--first", str(first), "--last", str(last), *more],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == (-9 if end == "kill" else 0), done.stderr
    return done.stdout + done.stderr


def sync(path: Path) -> None:
    command = Path(sys.executable).with_name("wandb")
    subprocess.run([str(command), "sync", str(path)], check=True, timeout=60, stdin=subprocess.DEVNULL)


def check_whole(rows: list[dict], last: int) -> None:
    """Every metric of every step is there once, in order."""
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, last + 1))
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1 / s for s in range(1, last + 1)]
    epochs = list(range(STEPS_PER_EPOCH, last + 1, STEPS_PER_EPOCH))
    for name in ("train_acc1", "train_loss", "test_acc1", "test_acc5", "test_loss"):
        assert [row["step"] for row in rows if name in row] == epochs
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert all(row["images_seen"] == 8 * row["step"] for row in rows)


@pytest.fixture(scope="module")
def thrice_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps in four processes: two were killed beyond their last checkpoint."""
    run = tmp_path_factory.mktemp("thrice") / "run"
    train(run, 0, 7, end="kill")
    train(run, 5, 9, end="kill")
    train(run, 9, 14)
    train(run, 12, 20)
    return run


def test_a_run_resumed_three_times_is_one_whole_offline_run(thrice_resumed: Path) -> None:
    files = list((thrice_resumed / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    records = list(read_records(files[0]))
    ids = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert ids == {run_id_of(thrice_resumed)}
    assert records[-1].WhichOneof("record_type") == "exit"
    check_whole(read_history(files[0]), 20)


def test_axes_and_best_summaries_are_defined(thrice_resumed: Path) -> None:
    file = next((thrice_resumed / "wandb").glob("offline-run-*/*.wandb"))
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric
        for record in read_records(file)
        if record.WhichOneof("record_type") == "metric"
    }
    assert {"step", "epoch", "images_seen", "*"} <= metrics.keys()
    assert metrics["*"].step_metric == "step"
    assert metrics["test_acc1"].summary.max
    assert metrics["test_loss"].summary.min
    assert metrics["test_acc1"].step_metric == "step"


def test_wandb_sync_uploads_a_resumed_run_whole(thrice_resumed: Path, wandb_server) -> None:
    sync(thrice_resumed / "wandb")
    check_whole(wandb_server.rows(run_id_of(thrice_resumed)), 20)


def test_a_run_synced_between_resumes_is_whole_after_the_next_sync(tmp_path: Path, wandb_server) -> None:
    run = tmp_path / "run"
    train(run, 0, 7)
    sync(run / "wandb")
    train(run, 5, 12)
    sync(run / "wandb")
    check_whole(wandb_server.rows(run_id_of(run)), 12)


def test_the_trap_is_real_one_folder_a_process_repeats_steps(tmp_path: Path, wandb_server) -> None:
    """What the tests above would see if a resumed run simply kept one offline folder per process: steps 5
    and 6, logged before and after the crash, are there twice (older wandb would even lose steps 0 to 4)."""
    naive = (
        "import wandb, sys; first = int(sys.argv[1]);"
        f"run = wandb.init(project='p', id='naive', mode='offline', resume='allow', dir={str(tmp_path)!r});"
        "[run.log({'step': s}) for s in range(first, first + 7)]; run.finish()"
    )
    for first in ("0", "5"):
        subprocess.run([sys.executable, "-c", naive, first], check=True, timeout=60, capture_output=True)
    sync(tmp_path / "wandb")
    steps = [row["step"] for row in wandb_server.rows("naive")]
    assert steps != sorted(set(steps))


def test_online_and_offline_processes_of_one_run_are_one_curve(tmp_path: Path, wandb_server) -> None:
    run = tmp_path / "run"
    train(run, 0, 7, wandb="online", end="preempted")
    check_whole(wandb_server.rows(run_id_of(run)), 7)
    assert wandb_server.preempting
    train(run, 5, 9)  # no network for a while
    train(run, 8, 12, wandb="online", end="alert")
    check_whole(wandb_server.rows(run_id_of(run)), 12)
    assert wandb_server.config[run_id_of(run)]["lr"]["value"] == 0.1
    assert [alert["title"] for alert in wandb_server.alerts] == ["NaN in the loss"]


def test_checkpoints_become_artifacts_and_names_reach_the_run(tmp_path: Path) -> None:
    names = ["--wandb-group", "g", "--wandb-tags", "a", "b", "--wandb-notes", "n", "--wandb-project", "p"]
    printed = train(tmp_path / "run", 0, 4, "--wandb-log-model", *names)
    assert printed.count("step_0 is no artifact") == 1
    assert "switched off" not in printed
    file = next((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    records = list(read_records(file))
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.run_group, list(run.tags), run.notes, run.project) == ("g", ["a", "b"], "n", "p")
    requests = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    assert [(a.type, a.name, sorted(a.aliases)) for a in requests] == [
        ("model", "run-checkpoint", ["best", "latest"])
    ]
    check_whole(read_history(file), 4)


def test_no_key_is_offline_without_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    printed = train(tmp_path / "run", 0, 4, wandb="online")
    assert printed.count("W&B is offline: no API key is configured") == 1
    assert printed.count("wandb sync") == 1
    check_whole(read_history(next((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))), 4)


def test_a_dead_network_is_offline_at_once_with_one_notice(tmp_path: Path, wandb_server) -> None:
    wandb_server.stop()
    began = time.monotonic()
    printed = train(tmp_path / "run", 0, 4, wandb="online")
    assert time.monotonic() - began < 25
    assert printed.count("cannot be reached") == 1
    check_whole(read_history(next((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))), 4)


DIES = """
import argparse, os, sys, time
from pathlib import Path
import scalesnn.tracking.wandb_sink as wandb_sink
from scalesnn.tracking import add_tracking_arguments, create_tracker

wandb_sink.WAIT_S = 3.0
parser = argparse.ArgumentParser()
add_tracking_arguments(parser)
tracker = create_tracker(parser.parse_args(["--wandb", "online"]), Path(sys.argv[1]), {})
sink = next(sink for sink in tracker._sinks if sink.name == "W&B")
slowest = 0.0
for step in range(1, 401):
    if step == 200:
        while sink._run is None or not sink._queue.empty():
            time.sleep(0.05)
        print("ready", flush=True)
        sys.stdin.readline()
    began = time.perf_counter()
    tracker.log_step({"step": step, "epoch": 0, "loss": 1 / step})
    slowest = max(slowest, time.perf_counter() - began)
began = time.perf_counter()
tracker.close()
print("slowest", slowest, "close", time.perf_counter() - began, flush=True)
"""


def test_a_network_that_dies_in_the_middle_slows_no_step_and_loses_nothing(
    tmp_path: Path, wandb_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DIES, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    while "ready" not in (line := process.stdout.readline()):
        assert line
    wandb_server.stop()
    process.stdin.write("\n")
    process.stdin.close()
    began = time.monotonic()
    printed = process.stdout.read()
    assert process.wait(60) == 0
    assert time.monotonic() - began < 30
    figures = printed[printed.index("slowest") :].split()
    assert float(figures[1]) < 0.5
    assert float(figures[3]) < 15
    assert "python" in printed
    assert "scalesnn.tracking.wandb_sink" in printed  # the line that makes it uploadable: do as it says
    monkeypatch.delenv("WANDB_BASE_URL")
    folder = Path(write_offline_run(tmp_path).split()[-1])
    wandb.teardown()  # as at a process's end: the file is on disk
    assert [row["step"] for row in read_history(next(folder.glob("*.wandb")))] == list(range(1, 401))


def test_run_id_is_a_sweep_agents_or_kept_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = run_id_of(tmp_path)
    assert run_id_of(tmp_path) == first
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    assert run_id_of(tmp_path / "other") == "agent1"
    assert run_id_of(tmp_path) == first


def test_a_cut_or_damaged_wandb_file_is_read_to_its_end_or_refused(
    thrice_resumed: Path, tmp_path: Path
) -> None:
    source = next((thrice_resumed / "wandb").glob("offline-run-*/*.wandb"))
    whole = len(list(read_records(source)))
    file = tmp_path / "cut.wandb"
    shutil.copy(source, file)
    os.truncate(file, file.stat().st_size - 5)
    assert len(list(read_records(file))) == whole - 1
    data = bytearray(source.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        list(read_records(file))
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"not a \.wandb file"):
        list(read_records(file))


def test_the_sweep_starts_trainings_whose_flags_exist() -> None:
    """The command is put together by W&B's own agent code."""
    import yaml
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    from scalesnn.model.train_imagenet_example import SResNetTrainer

    root = Path(__file__).parents[2]
    sweep = yaml.safe_load((root / "configs" / "sweep.yaml").read_text())
    assert (root / sweep["program"]).exists()
    values = {
        name: {"value": spec["values"][0] if "values" in spec else spec["min"]}
        for name, spec in sweep["parameters"].items()
    }
    known = create_sweep_command_args({"args": values})
    known |= {"interpreter": ["python"], "program": [sweep["program"]]}
    words: list[str] = []
    for part in create_sweep_command(sweep["command"]):
        words += known[part[2:-1]] if part.startswith("${") else [part]
    args = SResNetTrainer().get_args_parser().parse_args(words[2:])
    assert (args.lr, args.T, args.model, args.weight_decay) == (0.005, 2, "spiking_resnet18", 0.0)
    assert (args.wandb, args.train_crop_size) == ("online", 28)


def test_the_report_layout_names_metrics_that_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util
    import re

    path = Path(__file__).parents[2] / "configs" / "wandb_report.py"
    spec = importlib.util.spec_from_file_location("wandb_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logged = {"train/loss", "train/lr", "train/mfu", "memory/peak_bytes", "memory/reserved_bytes"}
    logged |= {
        f"train/{name}" for name in ("images_per_s", "compute_images_per_s", "data_wait_s", "device_hours")
    }
    logged |= {
        f"{split}_{name}" for split in ("train", "test", "ema_test") for name in ("loss", "acc1", "acc5")
    }
    logged |= {"spikes/firing_rate", "spikes/dead_share", "spikes/saturated_share", "time/forward_s"}
    logged |= {f"spikes/layer1.0.sn1/{name}" for name in ("firing_rate", "dead_share", "firing_rate_t/t0")}
    logged |= {"membrane/sn1/active_share", "gradient_norm/conv1", "energy/synops_per_image"}
    logged |= {"energy/snn_mj_per_image", "energy/ann_mj_per_image"}
    for panels in module.LAYOUT.values():
        for title, metrics, _ in panels:
            if isinstance(metrics, str):
                assert any(re.fullmatch(metrics, name) for name in logged), title
            else:
                assert set(metrics) <= logged, title
    assert module.main(["--dry-run"]) == 0
    assert "Firing rate of each layer" in capsys.readouterr().out
