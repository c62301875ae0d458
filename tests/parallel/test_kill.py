"""Killed at any moment, a run loses nothing but the steps since its last checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("kill_worker.py")
SOAK = WORKER.parents[2] / "tools" / "soak.py"


def run(folder: Path, kills: int, seed: int) -> tuple[dict[str, Any], list[list[Any]]]:
    """The worker's account, and the lines of the log."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), str(kills), str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240 + 20 * kills,
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (folder / "log").read_text().splitlines() if line.endswith("]")]
    return json.loads(done.stdout), log


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.long)])
@pytest.mark.parametrize("seed", [1, 7])  # 7: checkpoints are written in the background
def test_killed_at_random_moments_and_resumed(tmp_path: Path, seed: int, kills: int) -> None:
    _, unbroken = run(tmp_path / "unbroken", 0, seed)
    losses = {line[1]: line[2] for line in unbroken if line[0] == "step"}
    assert len(losses) == 60

    account, log = run(tmp_path / "killed", kills, seed)
    assert account["status"] == 0
    assert account["kills"] == kills
    assert account["amid_writing"] >= kills / 3
    saved = reached = starts_amid = 0
    for before, line in zip([["end"], *log], log, strict=False):
        if line[0] == "start":
            if before[0] == "end":  # that life came to its end unharmed, and the folder was put aside
                saved = reached = 0
            # What was saved is there; a life may find a checkpoint that was complete but not yet reported.
            assert saved <= line[1] <= reached
            starts_amid += line[1] > 0
        elif line[0] == "step":
            reached = line[1]
            assert line[2] == losses[line[1]], f"step {line[1]} differs from the unbroken run"
        elif line[0] == "saved" and seed != 7:
            saved = line[1]
    assert starts_amid >= kills / 3
    assert log[-1] == unbroken[-1]
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["best", "latest", "step_00000054", "step_00000057", "step_00000060"]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_runs_that_compete_and_are_killed_in_evaluations_too_lose_nothing(tmp_path: Path, seed: int) -> None:
    """A minute of the soak: whole trainings that are killed, signalled, started twice and resumed."""
    done = subprocess.run(
        [sys.executable, str(SOAK), "--minutes", "1", "--seed", str(seed), "--folder", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOAK.parents[1])},
        capture_output=True,
        text=True,
        timeout=840,
    )
    report = json.loads(done.stdout)
    assert report["found"] == []
    assert done.returncode == 0
    assert report["lives"] >= 10
    assert report["started together"] >= 2
    assert any("kill (evaluation)" in name for name in report["troubles"])
