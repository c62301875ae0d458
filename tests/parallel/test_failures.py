"""A rank that dies takes the job down, and the survivors say which one it was."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from scalesnn.base import UserError
from scalesnn.parallel.failure import is_alive, is_lost_connection

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

# (rank that dies, how, what the other rank says of it)
DEATHS = {
    "raises": (1, "raise", "failed: RuntimeError: on purpose"),
    "is killed": (1, "SIGKILL", "is gone: it was killed"),
    "is rank 0 and is killed": (0, "SIGKILL", "is gone"),
    "hangs": (1, "SIGSTOP", "has given no sign of life for 3 s"),
}


@pytest.fixture(scope="module")
def deaths(worlds: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two ranks of each world said and how they ended."""
    cases = []
    for victim, how, _ in DEATHS.values():
        cell: dict[str, Any] = {"die": {"rank": victim, "step": 3, "how": how}, "ema": False}
        if how == "SIGSTOP":
            cell["patience"] = 3.0
        cases.append({"size": 2, "cells": {"cell": cell}, "may_fail": True})
    return dict(zip(DEATHS, worlds(cases, tmp_path_factory.mktemp("deaths"), timeout=150), strict=True))


@pytest.mark.parametrize("case", DEATHS)
def test_survivor_names_the_rank_that_died(deaths: dict[str, Any], case: str) -> None:
    victim, how, expected = DEATHS[case]
    dead, survivor = deaths[case][victim], deaths[case][1 - victim]
    assert survivor.code == 1
    lines = [line for line in survivor.err.splitlines() if line.startswith("scalesnn: ")]
    assert len(lines) == 1, survivor.err
    assert lines[0].startswith(f"scalesnn: rank {1 - victim} stops, because rank {victim} (host ")
    assert expected in lines[0]
    assert "Traceback" not in survivor.err
    if how == "raise":
        assert dead.code == 1
        assert "RuntimeError: on purpose" in dead.err
        assert "Traceback" in dead.err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:3456"),
            True,
        ),
        (RuntimeError("NCCL communicator was aborted"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("connection reset"), False),
        (ValueError("T must be at least 1"), False),
    ],
)
def test_lost_connections_are_told_from_errors_of_ones_own(error: Exception, expected: bool) -> None:
    assert is_lost_connection(error) is expected


def test_a_process_that_has_ended_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    for _ in range(200):  # a zombie until it is waited for
        if not is_alive(process.pid):
            break
        time.sleep(0.05)
    assert not is_alive(process.pid)
    process.wait()
    assert not is_alive(process.pid)
