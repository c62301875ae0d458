"""Ranks that never come, and rendezvous files of yesterday: said soon, and in one line."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from scalesnn.base import UserError
from scalesnn.parallel import meeting
from scalesnn.parallel.topology import Topology, free_port


def place(rank: int, source: str = "environment", port: int = 0) -> Topology:
    return Topology(
        world_size=2, local_world_size=2, rank=rank, local_rank=rank, source=source,
        master_port=port or free_port(),
    )  # fmt: skip


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(meeting, "SAY_AFTER", 0.3)


def test_rank_0_says_who_is_missing_and_ends_with_a_line(impatient, capsys):
    with pytest.raises(UserError, match=r"rank 1 of 2 missing after 0.0 minutes \(--dist-timeout\)"):
        meeting.meet("env://", place(0), timedelta(seconds=1))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scalesnn: rank 1 of 2 missing after 0 s at 127.0.0.1:")
    assert "start one process for each RANK below WORLD_SIZE=2" in line


def test_another_rank_says_that_rank_0_is_missing(impatient, capsys):
    with pytest.raises((RuntimeError, ValueError)):
        meeting.meet("env://", place(1), timedelta(seconds=1))
    assert "rank 1 has waited for 0 s for rank 0 at 127.0.0.1:" in capsys.readouterr().err


def test_ranks_that_come_meet_without_a_word(capsys):
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        stores = list(
            pool.map(lambda r: meeting.meet("env://", place(r, port=port), timedelta(seconds=30)), (0, 1))
        )
    stores[0].set("word", "said")
    assert stores[1].get("word") == b"said"
    assert capsys.readouterr().err == ""


def test_an_interactive_srun_is_named(monkeypatch):
    text = meeting.why_missing(place(0, "slurm"), {"SLURM_JOB_NAME": "bash"})
    assert "start `srun -n 2 python …` from outside of it" in text
    assert "env -u SLURM_STEP_ID" in text


def leave_a_file(path: str) -> None:
    store = meeting.dist.FileStore(path, 2)
    store.set(meeting.HERE.format(0), "1")
    meeting.os._exit(0)  # as a killed run does: nothing is cleaned up


def test_a_rendezvous_file_of_an_earlier_run_is_refused(tmp_path: Path):
    path = tmp_path / "meet"
    process = multiprocessing.get_context("fork").Process(target=leave_a_file, args=(str(path),))
    process.start()
    process.join(30)
    assert path.exists()
    with pytest.raises(UserError, match="an earlier run has left this file; delete it"):
        meeting.meet(f"file://{path}", place(0), timedelta(seconds=5))
