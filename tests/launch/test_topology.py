"""Every launcher's environment gives the right place; a contradiction names its variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalesnn.base import UserError
from scalesnn.parallel import launchers
from scalesnn.parallel.launchers import expand_counts, expand_hostlist
from scalesnn.parallel.topology import Topology

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "5", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4",
         "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[01-02]",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
}  # fmt: skip
BY_HAND = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
           "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}  # fmt: skip
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "deepspeed": DEEPSPEED,
    "openmpi": OPENMPI,
    "slurm": SLURM,
    "environment": BY_HAND,
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("scalesnn.parallel.topology.interface_towards", lambda address: "eth0")
    monkeypatch.setattr(launchers, "node_address", lambda name: name)


def place(topology: Topology) -> tuple[int, ...]:
    return (topology.rank, topology.world_size, topology.local_rank, topology.local_world_size,
            topology.node_rank, topology.nodes)  # fmt: skip


@pytest.mark.parametrize("source", LAUNCHERS)
def test_each_launcher_gives_the_same_place(source):
    topology = Topology.from_environment(LAUNCHERS[source])
    assert topology == Topology(2, 1, 4, 1, 5, 8, "10.0.0.1", 29501, source, "eth0")


def test_mpich_counts_as_mpi():
    topology = Topology.from_environment(MPICH)
    assert (place(topology), topology.source) == ((5, 8, 1, 4, 1, 2), "openmpi")


def test_a_pod_of_the_training_operator_is_one_process_of_its_own_node():
    pod = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "RANK": "2", "WORLD_SIZE": "4",
           "MASTER_ADDR": "job-master-0",
           "MASTER_PORT": "23456", "PET_NNODES": "4", "PET_NPROC_PER_NODE": "1"}  # fmt: skip
    topology = Topology.from_environment(pod)
    assert (place(topology), topology.source) == ((2, 4, 0, 1, 2, 4), "kubernetes")


def test_torchrun_in_a_pod_is_torchrun():
    pod = {**TORCHRUN, "KUBERNETES_SERVICE_HOST": "10.96.0.1", "PET_NPROC_PER_NODE": "4", "PET_NNODES": "2"}
    assert Topology.from_environment(pod).source == "torchrun"


def test_nothing_set_is_one_process_with_a_free_port():
    first, second = Topology.from_environment({}), Topology.from_environment({})
    assert place(first) == (0, 1, 0, 1, 0, 1)
    assert first.source == "single"
    assert first.master_port != second.master_port


@pytest.mark.parametrize("inner", ["torchrun", "deepspeed", "openmpi"])
def test_the_launcher_that_srun_started_wins(inner):
    agent = {**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2",
             "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}  # fmt: skip
    topology = Topology.from_environment({**agent, **LAUNCHERS[inner]})
    assert (place(topology), topology.source) == ((5, 8, 1, 4, 1, 2), inner)


def test_the_batch_script_itself_is_not_a_task():
    batch = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "16",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
    }
    assert Topology.from_environment(batch).source == "single"


def test_slurm_chooses_the_first_node_and_a_port_of_the_job():
    first = {k: v for k, v in SLURM.items() if not k.startswith("MASTER")}
    here, other = (
        Topology.from_environment(first),
        Topology.from_environment({**first, "SLURM_JOB_ID": "1235"}),
    )
    assert here.master_addr == "gpu01"
    assert 10000 <= here.master_port < 30000
    assert here.master_port != other.master_port


def test_slurm_counts_uneven_nodes():
    uneven = {**SLURM, "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3"}
    topology = Topology.from_environment(uneven)
    assert (topology.local_world_size, topology.nodes) == (3, 2)
    with pytest.raises(UserError, match="same number of processes on every node"):
        _ = topology.mesh_shape


@pytest.mark.parametrize(
    ("base", "change", "names"),
    [
        (SLURM, {"RANK": "0"}, ("RANK=0", "SLURM_PROCID=5")),
        (SLURM, {"WORLD_SIZE": "1"}, ("WORLD_SIZE=1", "SLURM_STEP_NUM_TASKS=8")),
        (SLURM, {"LOCAL_RANK": "0"}, ("LOCAL_RANK=0", "SLURM_LOCALID=1")),
        (
            SLURM,
            {"SLURM_STEP_TASKS_PER_NODE": "8"},
            ("SLURM_STEP_TASKS_PER_NODE='8'", "SLURM_STEP_NUM_NODES=2"),
        ),
        (SLURM, {"SLURM_PROCID": "8"}, ("SLURM_PROCID=8", "SLURM_STEP_NUM_TASKS=8")),
        (SLURM, {"SLURM_NODEID": "2"}, ("SLURM_NODEID=2", "SLURM_STEP_NUM_NODES=2")),
        (TORCHRUN, {"RANK": "8"}, ("RANK=8", "WORLD_SIZE=8")),
        (TORCHRUN, {"LOCAL_RANK": "4"}, ("LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4")),
        (TORCHRUN, {"RANK": "five"}, ("RANK='five'",)),
        (TORCHRUN, {"MASTER_PORT": "99999"}, ("MASTER_PORT=99999",)),
        (DEEPSPEED, {"LOCAL_WORLD_SIZE": "8"}, ("LOCAL_WORLD_SIZE=8", "LOCAL_SIZE=4")),
        (DEEPSPEED, {"CROSS_RANK": "2"}, ("CROSS_RANK=2", "CROSS_SIZE=2")),
        (OPENMPI, {"RANK": "4"}, ("RANK=4", "OMPI_COMM_WORLD_RANK=5")),
        (
            OPENMPI,
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"},
            ("OMPI_COMM_WORLD_SIZE=8", "OMPI_COMM_WORLD_LOCAL_SIZE=3"),
        ),
        (OPENMPI, {"MASTER_ADDR": ""}, ("MASTER_ADDR", "mpirun -x MASTER_ADDR")),
        (BY_HAND, {"WORLD_SIZE": ""}, ("WORLD_SIZE is not set", "RANK=5")),
        (BY_HAND, {"LOCAL_RANK": ""}, ("LOCAL_RANK is not set",)),
        (BY_HAND, {"MASTER_ADDR": ""}, ("MASTER_ADDR is not set", "WORLD_SIZE=8")),
        (BY_HAND, {"LOCAL_WORLD_SIZE": "3"}, ("WORLD_SIZE=8", "LOCAL_WORLD_SIZE=3")),
        ({"PMIX_RANK": "3"}, {}, ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE")),
        (
            {"KUBERNETES_SERVICE_HOST": "h", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "m"},
            {"PET_NPROC_PER_NODE": "8"},
            ("PET_NPROC_PER_NODE=8", "torchrun"),
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "h", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "m"},
            {"PET_NNODES": "4"},
            ("PET_NNODES=4", "WORLD_SIZE=2"),
        ),
    ],
)
def test_a_contradiction_names_its_variables(base, change, names):
    with pytest.raises(UserError) as caught:
        Topology.from_environment({**base, **change})
    for name in names:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchruns_that_know_nothing_of_each_other_are_found():
    lonely = {**TORCHRUN, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "RANK": "1", "WORLD_SIZE": "4",
              "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}  # fmt: skip
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS=2 contradicts GROUP_WORLD_SIZE=1.*--nnodes 2"):
        Topology.from_environment(lonely)
    assert (
        Topology.from_environment({**lonely, "TORCHELASTIC_MAX_RESTARTS": "3"}).nodes == 1
    )  # shrunk: elastic


def test_the_flag_of_the_deepspeed_launcher():
    assert Topology.from_environment(DEEPSPEED, local_rank_flag=1).local_rank == 1
    with pytest.raises(UserError, match=r"--local_rank=0 contradicts LOCAL_RANK=1"):
        Topology.from_environment(DEEPSPEED, local_rank_flag=0)
    with pytest.raises(UserError, match=r"--local_rank=0 contradicts SLURM_LOCALID=1"):
        Topology.from_environment(SLURM, local_rank_flag=0)
    by_hand = {k: v for k, v in BY_HAND.items() if k != "LOCAL_RANK"} | {"MASTER_ADDR": "127.0.0.1"}
    by_hand["LOCAL_WORLD_SIZE"] = "8"
    assert Topology.from_environment(by_hand, local_rank_flag=5).local_rank == 5


def test_exported_variables_are_read_back_as_the_same_place():
    for source, environ in LAUNCHERS.items():
        exported = dict(environ)
        topology = Topology.from_environment(environ)
        topology.export_environment(exported)
        assert Topology.from_environment(exported) == topology, source
        assert exported["GLOO_SOCKET_IFNAME"] == exported["NCCL_SOCKET_IFNAME"] == "eth0"


def test_an_interface_that_the_user_chose_stays():
    topology = Topology.from_environment({**SLURM, "NCCL_SOCKET_IFNAME": "ib0"})
    exported = {"NCCL_SOCKET_IFNAME": "ib0"}
    topology.export_environment(exported)
    assert topology.interface == "ib0"
    assert exported["NCCL_SOCKET_IFNAME"] == "ib0"


def test_the_interface_is_the_one_of_the_route():
    assert launchers.interface_towards("127.0.0.1") == "lo"
    assert launchers.interface_towards("no-such-host.invalid") is None


def test_ranks_dealt_out_in_turns_make_no_mesh():
    assert Topology.from_environment(SLURM).mesh_shape == (2, 4)
    turns = {**SLURM, "SLURM_PROCID": "3"}  # node 1, local 1, of srun --distribution=cyclic
    with pytest.raises(UserError, match="--distribution=block"):
        _ = Topology.from_environment(turns).mesh_shape


def test_device_index():
    topology = Topology.from_environment(SLURM)
    assert topology.device_index(4) == 1
    assert topology.device_index(1) == 0  # --gpus-per-task=1
    with pytest.raises(UserError, match=r"4 processes on node 1, but torch sees 1 GPU"):
        Topology.from_environment(TORCHRUN).device_index(1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[08-10]-ib", ["r1n08-ib", "r1n09-ib", "r1n10-ib", "r2n08-ib", "r2n09-ib", "r2n10-ib"]),
        ("", []),
    ],
)
def test_hostlists(text, names):
    assert expand_hostlist(text) == names


@pytest.mark.parametrize("text", ["n[1-2", "n]1[", "n[2-1]", "n[a-b]", "a,,b", "n[1,]"])
def test_broken_hostlists_are_refused(text):
    with pytest.raises(UserError, match="not a list of hosts"):
        expand_hostlist(text)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 30)), min_size=1, max_size=6))
def test_counts_of_tasks(pairs):
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in pairs)
    assert expand_counts(text) == [count for count, times in pairs for _ in range(times)]


@pytest.mark.distributed
def test_the_mesh_and_the_process_group_of_two_real_processes():
    """torchrun's own children, two 'nodes' of one: the mesh's groups are the nodes' ranks."""
    program = """
import os, torch, torch.distributed as dist
from scalesnn.parallel.topology import Topology
t = Topology.from_environment(); t.export_environment()
dist.init_process_group("gloo"); mesh = t.device_mesh("cpu")
x = torch.ones(1) * (t.rank + 1); dist.all_reduce(x, group=mesh["shard"].get_group())
line = f"{t.source} {t.rank} {t.world_size} {t.local_world_size} {tuple(mesh.shape)} {x.item()}"
os.write(1, line.encode() + bytes([10]))
dist.barrier(); dist.destroy_process_group()
os._exit(0)  # gloo's threads abort about 1 in 15 interpreter shutdowns here ("terminate called without ...")
"""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--no-python",
         sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == [f"torchrun {r} 2 2 (1, 2) 3.0" for r in (0, 1)]
