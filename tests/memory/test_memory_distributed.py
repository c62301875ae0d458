"""Policies under DDP, ZeRO and FSDP2, on two real ranks with synchronised BatchNorm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalesnn.parallel.topology import free_port

WORKER = Path(__file__).with_name("memory_worker.py")
ROOT = WORKER.parents[2]

SPIKES = 19  # convolutions of the net whose input is spikes
STRATEGIES = [
    "ddp",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("zero1", "zero2", "zero3", "fsdp")),
]


def run(strategy: str, policies: list[str]) -> dict[str, dict[str, float]]:
    port = str(free_port())
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, str(WORKER), strategy, *policies]
        pipe = subprocess.PIPE
        ranks.append(
            subprocess.Popen(command, env={**os.environ, **place}, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        said = [process.communicate(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), said[0][1][-3000:] + said[1][1][-3000:]
    line = next(line for line in said[0][0].splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_policies_train_the_same_net_on_two_ranks(strategy):
    policies = ["layer", "block", "time:2"]
    found = run(strategy, policies)
    for policy in policies:
        assert found[policy]["losses"] < 1e-10, (policy, found)
        assert found[policy]["state"] < 1e-10, (policy, found)
        if policy != "block":
            assert found[policy]["as_bits"] == SPIKES, (policy, found)
        if strategy == "fsdp":  # blocks are gathered for forward and for backward, whatever runs inside
            assert found[policy]["gathers"] == found["none"]["gathers"], (policy, found)


@pytest.mark.long
@pytest.mark.distributed
def test_chunks_do_not_gather_weights_again():
    policies = ["layer", "time:2"]
    found = run("zero3-tight", policies)
    convolutions = 20
    for policy in policies:
        assert found[policy]["state"] < 1e-10, (policy, found)
        extra = found[policy]["gathers"] - found["none"]["gathers"]
        assert 0 < extra <= 2 * convolutions, (policy, found)  # their backward, not their chunks
