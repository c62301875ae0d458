"""A rank that stands still is found, its stack is kept, and the process ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scalesnn
from scalesnn.base import UserError
from scalesnn.tracking.wandb_log import read_records
from scalesnn.training.hang_watch import HangWatch, describe_stacks, short_list

ENVIRON = {**os.environ, "PYTHONPATH": str(Path(scalesnn.__file__).parents[1])}


def run(program: str, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=timeout, env=ENVIRON
    )


def test_a_hang_is_an_alert_in_every_sink(tmp_path):
    """The console, events.jsonl and an offline W&B run have it, though the process ends by itself."""
    program = """
import sys, time
from pathlib import Path
from scalesnn.tracking.console import ConsoleSink
from scalesnn.tracking.jsonl import JsonlSink
from scalesnn.tracking.tracker import Tracker
from scalesnn.tracking.wandb_sink import WandbOptions, WandbSink
from scalesnn.training.hang_watch import HangWatch
folder, tracker = Path(sys.argv[1]), Tracker()
tracker.add_sink("console", ConsoleSink)
tracker.add_sink("metrics.jsonl", lambda: JsonlSink(folder))
tracker.add_sink("W&B", lambda: WandbSink(folder, WandbOptions()))
tracker.log_step({"step": 7, "loss": 1.0})
with HangWatch(1.0, folder, rank=0, world_size=1, grace=8.0) as watch:
    watch.alert = tracker.stalled
    time.sleep(300)
"""
    done = run(program, str(tmp_path))
    assert done.returncode == 124
    assert "scalesnn: the training stands still: no step for 1 s" in done.stdout
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("alert", 7), ("end", 7)]
    assert str(tmp_path / "hang") in events[0]["text"]
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    alerts = [r.alert for r in read_records(log) if r.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in alerts] == ["the training stands still"]


def test_an_alert_that_hangs_itself_holds_nothing_up(tmp_path):
    program = HANG.replace("    for _", "    watch.alert = lambda text: time.sleep(300)\n    for _")
    assert "watch.alert" in program
    assert run(program, str(tmp_path)).returncode == 124


HANG = """
import sys, time
from pathlib import Path
from scalesnn.training.hang_watch import HangWatch
def wait_for_ever():
    time.sleep(300)
with HangWatch(0.6, Path(sys.argv[1]), rank=0, world_size=2, grace=0.3) as watch:
    for _ in range(3):
        time.sleep(0.1); watch.tick()
    wait_for_ever()
"""


def test_a_hang_ends_the_process_and_leaves_its_stack(tmp_path):
    before = time.monotonic()
    done = run(HANG, str(tmp_path))
    assert done.returncode == 124
    assert time.monotonic() - before < 30
    stack = (tmp_path / "hang/rank_0.txt").read_text()
    assert "wait_for_ever" in stack
    assert "after 4 steps" in stack or "after 3 steps" in stack
    assert "no step for" in done.stderr
    assert "rank 0: <string>:6 in wait_for_ever" in done.stderr
    assert "rank 1: no stack" in done.stderr


def test_a_thread_that_keeps_the_interpreter_is_ended_too(tmp_path):
    """A C call that never gives the lock back: no Python thread can run, only faulthandler's."""
    program = """
import ctypes, sys
from pathlib import Path
from scalesnn.training.hang_watch import HangWatch
with HangWatch(0.4, Path(sys.argv[1]), rank=0, world_size=1, grace=0.2):
    ctypes.PyDLL(None).sleep(300)
"""
    assert run(program, str(tmp_path)).returncode == 1
    assert 'File "<string>", line 6' in (tmp_path / "hang/rank_0.txt").read_text()


def test_a_steady_training_is_left_alone_and_leaves_nothing(tmp_path):
    with HangWatch(1.0, tmp_path, 0, 1, grace=0.1) as watch:
        for _ in range(8):
            time.sleep(0.2)
            watch.tick()
    assert not (tmp_path / "hang").exists()


def test_ranks_that_end_together_clean_up_together(tmp_path):
    watches = [HangWatch(60.0, tmp_path, rank, 3) for rank in range(3)]
    for watch in watches:
        watch.__enter__()
    assert len(list((tmp_path / "hang").iterdir())) == 3
    shutil.rmtree(tmp_path / "hang")  # another rank was quicker between our looking and our removing
    for watch in watches:
        watch.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_the_stack_of_another_rank_is_kept(tmp_path):
    with HangWatch(60.0, tmp_path, 0, 2):
        (tmp_path / "hang/rank_1.txt").write_text("a stack")
    assert [path.name for path in (tmp_path / "hang").iterdir()] == ["rank_1.txt"]


def test_zero_watches_nothing(tmp_path):
    with HangWatch(0, tmp_path, 0, 1) as watch:
        watch.tick()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timeout", [-1.0, float("inf"), float("nan")])
def test_a_bad_timeout_is_refused(tmp_path, timeout):
    with pytest.raises(UserError, match="--hang-timeout must be 0 or more seconds"):
        HangWatch(timeout, tmp_path, 0, 1)


def test_the_odd_rank_stands_first(tmp_path):
    here = "/x/scalesnn/parallel/ddp.py"
    for rank in range(8):
        if rank == 5:
            continue
        inner = ("/torch/distributed.py", 10, "all_reduce", here, 42, "backward")
        if rank == 3:
            inner = ("/usr/lib/queue.py", 99, "get", "/x/scalesnn/data/dali.py", 7, "epoch")
        (tmp_path / f"rank_{rank}.txt").write_text(
            "rank …\nThread 0x01 (most recent call first):\n"
            '  File "/x/scalesnn/training/hang_watch.py", line 1 in _watch\n\n'
            "Thread 0x02 (most recent call first):\n"
            f'  File "{inner[0]}", line {inner[1]} in {inner[2]}\n'
            f'  File "{inner[3]}", line {inner[4]} in {inner[5]}\n'
        )
    lines = describe_stacks(tmp_path, 8)
    assert lines == [
        "rank 3: dali.py:7 in epoch, inside queue.py:99 get",
        "rank 5: no stack: the process is stopped, or its node is gone",
        "ranks 0-2,4,6-7: ddp.py:42 in backward, inside distributed.py:10 all_reduce",
    ]


def test_short_lists():
    assert short_list([0, 1, 2, 5]) == "0-2,5"
    assert short_list([4]) == "4"
    assert short_list([1, 3, 4]) == "1,3-4"


@pytest.mark.distributed
def test_one_hung_rank_of_two_ends_both_with_both_stacks(tmp_path):
    """Rank 1 sleeps, rank 0 waits for it in a collective: both leave stacks that show which is which."""
    program = f"""
import os, time, torch, torch.distributed as dist
from pathlib import Path
from scalesnn.training.hang_watch import HangWatch
dist.init_process_group("gloo"); rank = dist.get_rank()
def slow_batch(): time.sleep(100)
with HangWatch(1.5, Path({str(tmp_path)!r}), rank, 2, grace=1.0) as watch:
    for step in range(3):
        dist.all_reduce(torch.ones(1)); watch.tick()
    if rank == 1: slow_batch()
    dist.all_reduce(torch.ones(1))
"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--no-python", sys.executable, "-c", program]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRON)
    assert done.returncode != 0
    assert "all_reduce" in (tmp_path / "hang/rank_0.txt").read_text()
    assert "slow_batch" in (tmp_path / "hang/rank_1.txt").read_text()
    assert "in slow_batch" in done.stderr
