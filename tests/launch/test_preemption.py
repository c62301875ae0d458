"""Signals, agreement, requeueing and the end of restart loops; tests/cluster has the real Slurm."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scalesnn.base import UserError
from scalesnn.training import preemption
from scalesnn.training.preemption import Preemption, StoppedBySignalError, is_restart, job_run_name


class Alone:
    """One rank that counts how often it is asked."""

    is_main = True

    def __init__(self) -> None:
        self.asked = 0

    def any_rank(self, flag: bool) -> bool:
        self.asked += 1
        return flag


class Ranks:
    """Threads that stand for ranks: ``any_rank`` is a real meeting of all of them."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.flags = [False] * count

    def rank(self, number: int) -> RankOf:
        return RankOf(self, number)


class RankOf:
    def __init__(self, ranks: Ranks, number: int) -> None:
        self.ranks, self.number, self.is_main = ranks, number, number == 0

    def any_rank(self, flag: bool) -> bool:
        self.ranks.flags[self.number] = flag
        self.ranks.barrier.wait(20)
        answer = any(self.ranks.flags)
        self.ranks.barrier.wait(20)
        return answer


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that writes down how it was called; the job's state stands in ``state``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "state").write_text("RUNNING")
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {folder}/calls\n'
        f'[ "$1" = show ] && echo "JobId=7 JobState=$(cat {folder}/state) Reason=None"\n'
        f"exit $(cat {folder}/rc)\n"
    )
    (folder / "rc").write_text("0")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_a_flag(number):
    before = signal.getsignal(number)
    with Preemption(environ={}) as watch:
        assert not watch.requested
        os.kill(os.getpid(), number)
        assert watch.requested
        assert watch.agreed(Alone())
    assert signal.getsignal(number) is before


def seconds_to_stop(happens) -> float:
    """How long a work of ten seconds lasts, at whose beginning something happens."""
    began = time.monotonic()
    with Preemption(environ={}) as watch:
        try:
            with watch.at_once():
                happens()
                time.sleep(10)
        except StoppedBySignalError:
            assert watch.requested
    return time.monotonic() - began


def test_before_there_is_anything_to_save_a_signal_ends_the_work_at_once():
    assert seconds_to_stop(lambda: os.kill(os.getpid(), signal.SIGUSR1)) < 5


def test_a_signal_in_a_finaliser_is_not_lost(capfd):
    """Python drops what is raised there; the soak found it."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    assert seconds_to_stop(Finalised) < 5
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once(capfd):
    with Preemption(environ={}) as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.requested
        assert "Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_not_requeued(tmp_path, scontrol):
    with Preemption(environ={"SLURM_JOB_ID": "7"}) as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.finish(Alone(), tmp_path, 1) == 130
    assert not (scontrol / "calls").exists()


def test_the_ranks_stop_at_the_same_step_whichever_has_the_signal():
    ranks, stopped = Ranks(3), {}

    def train(number: int) -> None:
        watch, strategy = Preemption(environ={"WORLD_SIZE": "3"}), ranks.rank(number)
        for step in range(1, 1000):
            if number == 2 and step == 5:
                watch.signal = signal.SIGTERM
            if watch.agreed(strategy):
                stopped[number] = step
                return

    threads = [threading.Thread(target=train, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(stopped) == 3
    assert len(set(stopped.values())) == 1
    assert 5 <= stopped[0] <= 5 + 64


def test_fast_steps_do_not_pay_for_the_question_at_each_step():
    strategy, watch = Alone(), Preemption(environ={"WORLD_SIZE": "2"})
    for _ in range(1000):
        watch.agreed(strategy)
    assert strategy.asked < 60


def test_slow_steps_are_asked_about_each_time(monkeypatch):
    strategy, clock = Alone(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = Preemption(environ={"WORLD_SIZE": "2"})
    asked = []
    for _ in range(20):
        clock[0] += 30.0
        before = strategy.asked
        watch.agreed(strategy)
        asked.append(strategy.asked > before)
    assert all(asked)


def test_a_forked_worker_ignores_its_copy_of_the_handler():
    with Preemption(environ={}) as watch:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(1 if watch.requested else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not watch.requested


def interrupted(tmp_path: Path, environ: dict[str, str], **settings: bool) -> tuple[int, dict, str]:
    said: list[str] = []
    with Preemption(environ=environ, **settings) as watch:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.agreed(Alone())
        code = watch.finish(Alone(), tmp_path, 12, said.append)
    return code, json.loads((tmp_path / "interrupted.json").read_text()), said[0]


def test_a_slurm_job_is_requeued_and_keeps_a_failing_exit_code(tmp_path, scontrol):
    code, record, said = interrupted(tmp_path, {"SLURM_JOB_ID": "7"})
    assert code == 128 + signal.SIGUSR1
    assert (scontrol / "calls").read_text().splitlines()[-1] == "requeue 7"
    assert (record["signal"], record["step"]) == ("SIGUSR1", 12)
    assert "job 7 is requeued" in said


def test_a_task_of_an_array_requeues_itself_alone(tmp_path, scontrol):
    interrupted(tmp_path, {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"})
    assert (scontrol / "calls").read_text().splitlines()[-1] == "requeue 7_2"


def test_a_cancelled_job_stays_cancelled(tmp_path, scontrol):
    (scontrol / "state").write_text("COMPLETING")
    _, record, _ = interrupted(tmp_path, {"SLURM_JOB_ID": "7"})
    assert "requeue" not in (scontrol / "calls").read_text()
    assert "COMPLETING" in record["outcome"]


def test_no_requeue(tmp_path, scontrol):
    code, record, _ = interrupted(tmp_path, {"SLURM_JOB_ID": "7"}, requeue=False)
    assert code == 138
    assert not (scontrol / "calls").exists()
    assert record["outcome"] == "not asked for a restart"


def test_without_scontrol_the_batch_script_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, record, _ = interrupted(tmp_path, {"SLURM_JOB_ID": "7"})
    assert code == 75
    assert "batch script" in record["outcome"]


def test_a_requeue_that_slurm_refuses_is_told(tmp_path, scontrol):
    (scontrol / "rc").write_text("1")
    code, _, said = interrupted(tmp_path, {"SLURM_JOB_ID": "7"})
    assert code == 138
    assert "submit the job again" in said


def test_an_uninterrupted_run_ends_with_zero(tmp_path):
    with Preemption(environ={}) as watch:
        assert watch.finish(Alone(), tmp_path, 3) == 0
    assert not (tmp_path / "interrupted.json").exists()


def test_a_loop_of_restarts_without_progress_ends(tmp_path):
    def start(step: int, count: int) -> None:
        environ = {"SLURM_RESTART_COUNT": str(count)} if count else {}
        Preemption(max_requeues=2, environ=environ).check_progress(Alone(), tmp_path, step)

    start(0, 0)
    start(4, 1)
    start(4, 2)
    start(4, 3)
    with pytest.raises(UserError, match=r"step 4 more than --max-requeues 2 times"):
        start(4, 4)


def test_progress_counts_anew(tmp_path):
    for count, step in enumerate([0, 0, 0, 5, 5, 5, 9, 9, 9]):
        environ = {"SLURM_RESTART_COUNT": str(count)}
        Preemption(max_requeues=2, environ=environ).check_progress(Alone(), tmp_path, step)


def test_every_rank_learns_that_the_loop_is_over(tmp_path):
    ranks, refused = Ranks(2), []
    (tmp_path / "restarts.json").write_text('{"step": 3, "times": 5}')

    def start(number: int) -> None:
        watch = Preemption(max_requeues=1, environ={"TORCHELASTIC_RESTART_COUNT": "6"})
        try:
            watch.check_progress(ranks.rank(number), tmp_path, 3)
        except UserError:
            refused.append(number)

    threads = [threading.Thread(target=start, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(refused) == [0, 1]


@pytest.mark.parametrize(
    ("environ", "name", "restarted"),
    [
        ({}, None, False),
        ({"SLURM_JOB_ID": "12"}, "job12", False),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}, "job12", True),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "job7_2", False),
        ({"TORCHELASTIC_RUN_ID": "none"}, None, False),
        ({"TORCHELASTIC_RUN_ID": "0b0c8f1e-3c8e-4f0a-9a53-1df3d4dcbc11"}, None, False),
        ({"TORCHELASTIC_RUN_ID": "big run/1", "TORCHELASTIC_RESTART_COUNT": "2"}, "jobbig-run-1", True),
    ],
)
def test_the_run_is_named_after_the_job(environ, name, restarted):
    assert (job_run_name(environ), is_restart(environ)) == (name, restarted)


def test_a_negative_limit_is_refused():
    with pytest.raises(UserError, match=r"--max-requeues must be at least 0, got -1"):
        Preemption(max_requeues=-1)


def test_a_signal_during_a_real_loop_ends_it_with_its_code(tmp_path):
    """A whole process: the step that runs when the signal comes is finished first."""
    program = """
import sys, time
from pathlib import Path
from scalesnn.training.preemption import Preemption
class Alone:
    is_main = True
    def any_rank(self, flag): return flag
with Preemption(environ={}) as watch:
    for step in range(400):
        print("begin", step, flush=True); time.sleep(0.05); print("end", step, flush=True)
        if watch.agreed(Alone()): break
    sys.exit(watch.finish(Alone(), Path(sys.argv[1]), step))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(preemption.__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begin 0\n"
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 128 + signal.SIGTERM
    assert sum(line.startswith("begin") for line in lines) + 1 == sum(
        line.startswith("end") for line in lines
    )
