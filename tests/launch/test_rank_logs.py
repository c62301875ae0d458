"""Every rank's words reach its file; only rank 0's, and one line for each error, reach the console."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import scalesnn

PROGRAM = """
import os, sys
from pathlib import Path
from scalesnn.base import UserError
from scalesnn.training.rank_logs import RankLog
rank, ending = int(sys.argv[2]), sys.argv[3]
with RankLog(Path(sys.argv[1]), rank):
    print("hello"); print("warning", file=sys.stderr)
    if rank: os.write(2, b"from below\\n")
    if ending == "error": raise RuntimeError("no luck\\nsecond line")
    if ending == "user": raise UserError("--T must be at least 1, got 0")
print("after")
"""


def run(folder: Path, rank: int, ending: str = "well") -> tuple[subprocess.CompletedProcess[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(rank), ending],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(scalesnn.__file__).parents[1])},
    )
    return done, (folder / f"logs/rank_{rank}.log").read_text()


def test_rank_0_speaks_to_both(tmp_path):
    done, log = run(tmp_path, 0)
    assert (done.stdout, done.stderr) == ("hello\nafter\n", "warning\n")
    assert log == "hello\nwarning\n"


def test_other_ranks_speak_to_their_file_alone(tmp_path):
    done, log = run(tmp_path, 3)
    assert (done.stdout, done.stderr) == ("after\n", "")
    assert sorted(log.splitlines()) == ["from below", "hello", "warning"]


def test_an_error_of_another_rank_is_one_line_on_the_console(tmp_path):
    done, log = run(tmp_path, 3, "error")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("[rank 3 on ")
    assert "RuntimeError: no luck (see " in done.stderr
    assert "Traceback" in log
    assert "second line" in log


def test_an_error_of_rank_0_is_told_in_full(tmp_path):
    done, log = run(tmp_path, 0, "error")
    assert "Traceback" in done.stderr
    assert "RuntimeError: no luck" in log


def test_bad_input_goes_on_to_the_entry_point(tmp_path):
    done, log = run(tmp_path, 3, "user")
    assert "UserError: --T must be at least 1" in done.stderr
    assert "Traceback" not in log


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_adds_to_its_log(tmp_path, rank):
    run(tmp_path, rank)
    _, log = run(tmp_path, rank)
    assert log.count("hello") == 2
