"""The logging interface and its plain sinks: console, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalesnn.base import UserError
from scalesnn.model import train_classify
from scalesnn.tracking import NullTracker, Tracker, create_tracker
from scalesnn.tracking.console import ConsoleSink, duration
from scalesnn.tracking.jsonl import read_jsonl
from scalesnn.tracking.records import named_scalars
from scalesnn.training.arguments import check_arguments

A_RUN = Path(__file__).with_name("a_run.py")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def log(tracker: Tracker, first: int, last: int) -> None:
    """Steps first + 1 … last, an epoch every 4 steps."""
    for step in range(first + 1, last + 1):
        record = {"step": step, "epoch": (step - 1) // 4, "images_seen": step * 8}
        tracker.log_step({**record, "loss": 1 / step, "spikes/sn1/firing_rate_t": [0.1, 0.2]})
        if step % 4 == 0:
            for split in ("train", "test", "ema_test"):
                tracker.log_epoch({**record, "split": split, "loss": 1 / step, "acc1": 1.0, "acc5": 2.0})


# ---- metrics.jsonl
# -------------------------------------------------------------------------------------------
def test_floats_are_kept_to_the_last_bit_and_tensors_unwrapped(tracking_args, tmp_path: Path) -> None:
    tracker = create_tracker(tracking_args, tmp_path, {})
    third = torch.tensor(1 / 3)
    tracker.log_step(
        {"step": 1, "epoch": 0, "loss": third, "rates": torch.tensor([0.1, 0.2]), "lr": 0.1 + 0.2}
    )
    tracker.close()
    (record,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert torch.tensor(record["loss"]).equal(third)
    assert record["lr"] == 0.1 + 0.2
    assert torch.tensor(record["rates"]).equal(torch.tensor([0.1, 0.2]))
    assert (record["kind"], record["split"]) == ("step", "train")


def test_numbers_that_json_does_not_have_are_written_as_strings(tracking_args, tmp_path: Path) -> None:
    tracker = create_tracker(tracking_args, tmp_path, {})
    tracker.log_step({"step": 1, "loss": math.nan, "norm": math.inf})
    tracker.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert math.isnan(float(record["loss"]))
    assert float(record["norm"]) == math.inf


def test_resumed_file_has_neither_gap_nor_repeat(tracking_args, tmp_path: Path) -> None:
    log(create_tracker(tracking_args, tmp_path, {}), 0, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 11, "lo')  # what a crash leaves
    log(create_tracker(tracking_args, tmp_path, {}, resumed=True, first_step=7), 7, 13)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 14))
    assert [r["step"] for r in records if r["kind"] == "epoch" and r["split"] == "test"] == [4, 8, 12]


def test_an_evaluation_that_is_repeated_on_resume_is_logged_once(tracking_args, tmp_path: Path) -> None:
    log(create_tracker(tracking_args, tmp_path, {}), 0, 4)
    again = create_tracker(tracking_args, tmp_path, {}, resumed=True, first_step=4)
    again.log_epoch({"step": 4, "epoch": 0, "split": "test", "loss": 0.0})
    again.close()
    assert [r["loss"] for r in read_jsonl(tmp_path / "metrics.jsonl") if r["split"] == "test"] == [0.25]


def test_a_new_run_in_an_old_folder_sets_the_old_metrics_aside(tracking_args, tmp_path: Path) -> None:
    log(create_tracker(tracking_args, tmp_path, {}), 0, 3)
    log(create_tracker(tracking_args, tmp_path, {}), 0, 2)
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    (aside,) = tmp_path.glob("metrics.jsonl.before-*")
    assert [r["step"] for r in read_jsonl(aside)] == [1, 2, 3]


# ---- TensorBoard
# ---------------------------------------------------------------------------------------------
def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tutorial_tags_are_there_per_epoch_and_steps_beside_them(tracking_args, tmp_path: Path) -> None:
    tracker = create_tracker(tracking_args, tmp_path, {})
    log(tracker, 0, 8)
    tracker.close()
    epochs, steps = scalars(tmp_path / "tb"), scalars(tmp_path / "tb" / "steps")
    tags = {f"{split}_{name}" for split in ("train", "test", "ema_test") for name in ("loss", "acc1", "acc5")}
    assert set(epochs) == tags
    assert epochs["test_loss"] == [(0, 0.25), (1, 0.125)]
    assert [step for step, _ in steps["train/loss"]] == list(range(1, 9))
    assert {"spikes/sn1/firing_rate_t/t0", "spikes/sn1/firing_rate_t/t1"} <= set(steps)


def test_resumed_tensorboard_forgets_what_comes_again(tracking_args, tmp_path: Path) -> None:
    first = create_tracker(tracking_args, tmp_path, {})
    log(first, 0, 10)
    first.close()
    again = create_tracker(tracking_args, tmp_path, {}, resumed=True, first_step=6)
    log(again, 6, 13)
    again.close()
    assert [step for step, _ in scalars(tmp_path / "tb" / "steps")["train/loss"]] == list(range(1, 14))
    assert [epoch for epoch, _ in scalars(tmp_path / "tb")["test_acc1"]] == [0, 1, 2]


def test_names_elsewhere_follow_the_table() -> None:
    step = {
        "kind": "step",
        "split": "train",
        "step": 1,
        "loss": 1,
        "a/b": 2.0,
        "t": [1, 2],
        "text": "x",
        "flag": True,
    }
    assert named_scalars(step) == {"train/loss": 1, "a/b": 2, "train/t/t0": 1, "train/t/t1": 2}
    epoch = {"kind": "epoch", "split": "test", "epoch": 3, "acc1": 9.0, "images_per_s": 5}
    assert named_scalars(epoch) == {"test_acc1": 9, "epoch/test_images_per_s": 5}


# ---- console
# -------------------------------------------------------------------------------------------------
def test_a_log_file_gets_plain_lines() -> None:
    stream = io.StringIO()
    console = ConsoleSink(stream, plain_every_s=0)
    tracker = Tracker(total_steps=4)
    tracker.add_sink("console", lambda: console)
    for step in range(1, 5):
        tracker.progress(
            {"step": step, "epoch": 0, "loss": torch.tensor(1.0), "acc1": 50.0, "images_per_s": 812.4}
        )
        tracker.log_epoch({"step": step, "epoch": step - 1, "split": "test", "loss": 0.5, "acc1": 60.0})
    tracker.alert("NaN in the loss", "step 3 was skipped")
    tracker.close({"best_acc1": 60.0})
    text = stream.getvalue()
    assert not CONTROL.search(text)
    assert "step 4/4" in text
    assert "812 images/s" in text
    assert re.search(r"\d left", text)
    assert text.count("acc@1   acc@5") == 1
    assert re.search(r"^ +4  test +0.5000 +60.00$", text, re.MULTILINE)
    assert "scalesnn: NaN in the loss: step 3 was skipped" in text
    assert "best acc1  60" in text


def test_progress_lines_come_at_a_sober_pace_and_at_the_end() -> None:
    stream = io.StringIO()
    tracker = Tracker(total_steps=1000)
    tracker.add_sink("console", lambda: ConsoleSink(stream, plain_every_s=60))
    for step in range(1, 1001):
        tracker.progress({"step": step})
    assert [line.split(" ·")[0] for line in stream.getvalue().splitlines()] == [
        "step 1/1000",
        "step 1000/1000",
    ]


class ReadBack(torch.Tensor):
    """A tensor that counts how often it is brought to the host."""

    read = 0

    def tolist(self) -> float:
        ReadBack.read += 1
        return 1.0


def test_progress_does_not_wait_for_the_device_while_no_line_is_due() -> None:
    tracker = Tracker(total_steps=1000)
    tracker.add_sink("console", lambda: ConsoleSink(io.StringIO(), plain_every_s=60))
    loss = torch.tensor(1.0).as_subclass(ReadBack)
    for step in range(1, 900):
        tracker.progress({"step": step, "loss": loss})
    assert ReadBack.read == 1


def on_a_terminal(tmp_path: Path, **environment: str) -> str:
    """What a run prints to a pseudo-terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(A_RUN), str(tmp_path / "run"), "--wandb", "disabled"],
        stdout=child,
        stderr=child,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", **environment},
    )
    os.close(child)
    printed = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:
            break
        if not data:
            break
        printed += data
    os.close(parent)
    assert process.wait(60) == 0
    return printed.decode()


def test_a_terminal_gets_a_live_line_and_colours_unless_no_color(tmp_path: Path) -> None:
    environment = {name: os.environ.pop(name) for name in ("NO_COLOR",) if name in os.environ}
    text = on_a_terminal(tmp_path)
    os.environ.update(environment)
    assert "\x1b[2K" in text  # the line is renewed
    assert re.search(r"\x1b\[[0-9;]*3\dm", text)
    assert "━" in text
    plain = on_a_terminal(tmp_path, NO_COLOR="1")
    assert "\x1b[2K" in plain
    assert not re.search(r"\x1b\[[0-9;]*[34]\dm", plain)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (42, "0:42"), (725, "12:05"), (11049, "3:04:09"), (184_200, "2 d 03:10"), (-1, "0:00")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- faults
# --------------------------------------------------------------------------------------------------
def test_a_full_disk_switches_the_files_off_with_one_notice_each_and_training_goes_on(
    tracking_args: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RLIMIT_FSIZE: the kernel refuses every write beyond 64 KiB of a file, as a full disk does."""
    script = (
        "import argparse, resource, signal, sys; from pathlib import Path;"
        "from scalesnn.tracking import add_tracking_arguments, create_tracker;"
        "parser = argparse.ArgumentParser(); add_tracking_arguments(parser);"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "tracker = create_tracker(parser.parse_args(['--wandb', 'disabled']), Path(sys.argv[1]), {});"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536));"
        "many = {f'm{i}': 0.1 for i in range(40)};"
        "[tracker.log_step({'step': s, 'loss': 1 / s, **many}) for s in range(1, 900)];"
        "[tracker.log_epoch({'step': s, 'epoch': s, 'loss': 1.0}) for s in range(900, 903)];"
        "tracker.close({'steps': 900})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for sink in ("metrics.jsonl", "TensorBoard"):
        assert done.stdout.count(f"{sink} is switched off for the rest of this run (OSError") == 1
    assert re.search("File too large|No space left", done.stdout)
    assert done.stdout.rstrip().endswith("steps  900")
    assert all(record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl"))


def test_a_folder_where_tensorboard_cannot_write_costs_tensorboard_alone(
    tracking_args: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tb").write_text(
        "a file where the folder should be: refused even to root, as a read-only folder is"
    )
    tracker = create_tracker(tracking_args, tmp_path, {})
    log(tracker, 0, 4)
    tracker.close()
    printed = capsys.readouterr().out
    assert printed.count("TensorBoard is switched off") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only mount needs root")
def test_a_read_only_tensorboard_folder(
    tracking_args: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tb"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        tracker = create_tracker(tracking_args, tmp_path, {})
        log(tracker, 0, 4)
        tracker.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    printed = capsys.readouterr().out
    assert printed.count("TensorBoard is switched off") == 1
    assert "Read-only file system" in printed
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 7


class Failing:
    """A sink that fails at its third record."""

    name = "failing"

    def __init__(self) -> None:
        self.taken = 0

    def log(self, record: dict) -> None:
        self.taken += 1
        if self.taken == 3:
            raise RuntimeError("broken\nin many lines")

    def event(self, event: dict) -> None:
        pass

    def close(self, summary: dict) -> list[str]:
        return []


def test_a_failing_sink_is_dropped_with_one_notice_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, failing = io.StringIO(), Failing()
    tracker = Tracker(total_steps=10)
    tracker.add_sink("console", lambda: ConsoleSink(stream))
    tracker.add_sink("failing", lambda: failing)
    log(tracker, 0, 8)
    tracker.close()
    assert failing.taken == 3
    text = "failing is switched off for the rest of this run (RuntimeError: broken); training goes on"
    assert stream.getvalue().count(text) == 1
    assert stream.getvalue().count(" test ") == 2


def test_a_console_that_breaks_is_reported_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    tracker = Tracker(total_steps=2)
    tracker.add_sink("console", lambda: ConsoleSink(stream, plain_every_s=0))
    stream.close()
    for step in (1, 2):
        tracker.progress({"step": step})
    tracker.close()
    assert capsys.readouterr().err.count("console is switched off") == 1


def test_other_ranks_have_a_tracker_that_keeps_nothing(tmp_path: Path) -> None:
    tracker = NullTracker()
    log(tracker, 0, 4)  # type: ignore[arg-type]
    tracker.progress({"step": 1})
    tracker.notice("x")
    tracker.alert("x", "y")
    tracker.log_checkpoint(tmp_path)
    tracker.close({})
    assert list(tmp_path.iterdir()) == []


def test_flags_that_make_no_sense_are_refused() -> None:
    parser = train_classify.Trainer().get_args_parser()
    for words, flag in (
        (["--metrics-every", "0"], "--metrics-every must be at least 1, got 0"),
        (["--spike-metrics-every", "-1"], "--spike-metrics-every must be at least 0, got -1"),
    ):
        with pytest.raises(UserError, match=flag):
            check_arguments(parser.parse_args(words))
    with pytest.raises(SystemExit):
        parser.parse_args(["--wandb", "sometimes"])
    assert "<function" not in parser.format_help()
