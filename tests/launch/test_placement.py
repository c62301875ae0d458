"""Cores and threads of a rank, on machines drawn in a folder that looks like /sys."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from scalesnn.parallel.placement import (
    choose_cores,
    gpu_addresses,
    gpu_numa_nodes,
    numa_nodes,
    parse_cpulist,
    physical_cores,
    threads_per_rank,
)
from scalesnn.parallel.topology import Topology


@pytest.fixture
def two_sockets(tmp_path):
    """Two NUMA nodes of 8 cores with 2 hyper-threads each: node 0 has 0-7,16-23, node 1 has 8-15,24-31."""
    for node, cpulist in enumerate(("0-7,16-23", "8-15,24-31")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpulist + "\n")
    for cpu in range(32):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 16},{cpu % 16 + 16}\n")
    for bus, node in (("17", 1), ("65", 0), ("ca", -1)):
        folder = tmp_path / f"bus/pci/devices/0000:{bus}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    return tmp_path


def test_numa_nodes_are_read(two_sockets):
    assert {node: len(cpus) for node, cpus in numa_nodes(two_sockets).items()} == {0: 16, 1: 16}


def test_ranks_share_the_cores_without_overlap_and_without_splitting_a_core(two_sockets):
    shares = [choose_cores(r, 8, set(range(32)), system=two_sockets) for r in range(8)]
    assert set.union(*shares) == set(range(32))
    assert sum(map(len, shares)) == 32
    for share in shares:
        assert {cpu % 16 for cpu in share} == {cpu % 16 for cpu in share if cpu < 16}
        assert all((cpu % 16 < 8) == (min(share) % 16 < 8) for cpu in share)  # within one NUMA node


def test_a_rank_stays_near_its_gpu(two_sockets):
    near = gpu_numa_nodes(["0000:17:00.0", "0000:65:00.0"], two_sockets)
    assert near == [1, 0]
    assert choose_cores(0, 2, set(range(32)), near=near, system=two_sockets) == {
        *range(8, 16),
        *range(24, 32),
    }
    assert choose_cores(1, 2, set(range(32)), near=near, system=two_sockets) == {*range(8), *range(16, 24)}


def test_a_gpu_whose_node_is_not_known_changes_nothing(two_sockets):
    near = gpu_numa_nodes(["0000:17:00.0", "0000:CA:00.0", "0000:ff:00.0"], two_sockets)
    assert near == [1, None, None]
    assert len(choose_cores(0, 3, set(range(32)), near=near, system=two_sockets)) == 10


def test_only_cores_that_slurm_allowed_are_taken(two_sockets):
    allowed = {2, 3, 18, 19, 8, 9, 24, 25}
    shares = [choose_cores(r, 2, allowed, system=two_sockets) for r in range(2)]
    assert shares == [{2, 3, 18, 19}, {8, 9, 24, 25}]


def test_too_few_cores_are_not_divided(tmp_path):
    assert choose_cores(1, 2, {0, 1}, system=tmp_path) == {0, 1}
    assert choose_cores(0, 1, set(range(8)), system=tmp_path) == set(range(8))


def test_cpulists():
    assert parse_cpulist("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpulist("\n") == set()


def test_threads():
    four = Topology(local_world_size=4, world_size=4)
    slurm = Topology(local_world_size=4, world_size=4, source="slurm")
    assert threads_per_rank(four, 64, {}) == 16
    assert threads_per_rank(four, 2, {}) == 1
    assert threads_per_rank(slurm, 64, {"SLURM_CPUS_PER_TASK": "7"}) == 7


def test_threads_that_were_chosen_or_have_no_neighbours_are_left_alone():
    assert threads_per_rank(Topology(local_world_size=4, world_size=4), 64, {"OMP_NUM_THREADS": "3"}) is None
    assert threads_per_rank(Topology(), 64, {}) is None


def test_hyper_threads_of_a_core_count_once(two_sockets):
    assert physical_cores(set(range(32)), two_sockets) == 16
    assert physical_cores({0, 16, 1}, two_sockets) == 2


def test_a_rank_gets_its_threads():
    program = """
import torch
from scalesnn.parallel.placement import place_process
from scalesnn.parallel.topology import Topology
environ = {"SLURM_CPUS_PER_TASK": "3"}
place_process(Topology(source="slurm"), bind=False, environ=environ)
assert torch.get_num_threads() == 3 and environ["OMP_NUM_THREADS"] == "3"
"""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", program], env=env, timeout=60).returncode == 0


def test_the_address_of_a_gpu_is_that_of_sys(monkeypatch):
    class Gpu:
        pci_domain_id, pci_bus_id, pci_device_id = 0, 0x17, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu())
    assert gpu_addresses() == ["0000:17:00.0"]


def test_binding_reaches_the_kernel():
    program = """
import os
from scalesnn.parallel import placement
from scalesnn.parallel.topology import Topology
placement.choose_cores = lambda *a, **k: {min(os.sched_getaffinity(0))}
before = min(os.sched_getaffinity(0))
assert placement.bind_to_cores(Topology(local_world_size=2, world_size=2), environ={}) == 1
assert os.sched_getaffinity(0) == {before}
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", program], env=env, timeout=60).returncode == 0


def test_slurm_s_own_binding_is_left_alone(monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *a: pytest.fail("bound anew"))
    environ = {"SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x1,0x2"}
    monkeypatch.setattr("scalesnn.parallel.placement.choose_cores", lambda *a, **k: {0})
    from scalesnn.parallel.placement import bind_to_cores

    assert bind_to_cores(Topology(local_world_size=2, world_size=2), environ=environ) == len(
        os.sched_getaffinity(0)
    )
