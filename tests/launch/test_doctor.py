"""`scalesnn doctor` finds planted faults and names the cure; without them it finds nothing.

Faults are planted for real where a test can: mounts and networks of a process of its own (unshare), missing
files, other versions on the module path, a clock that is wrong for one process.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

import scalesnn
from scalesnn.doctor import command, local, together
from scalesnn.doctor.compare import compare, slow_ones
from scalesnn.doctor.findings import Finding, Report, exit_code, print_table
from scalesnn.doctor.local import Settings
from scalesnn.parallel.topology import Topology, free_port

ROOT = Path(scalesnn.__file__).resolve().parents[1]
DOCTOR = [sys.executable, "-m", "scalesnn.cli", "doctor"]
ALONE = Topology()


def can_unshare() -> bool:
    """Whether this machine lets a test have mounts and a network of its own."""
    if not shutil.which("unshare") or os.geteuid() != 0:
        return False
    mount = "mount -t tmpfs none /mnt"
    return subprocess.run(["unshare", "-m", "-n", "sh", "-c", mount], capture_output=True).returncode == 0


needs_unshare = pytest.mark.skipif(not can_unshare(), reason="needs root and unshare (mounts of its own)")


@pytest.fixture
def images(tmp_path):
    """Two classes with two files each, in train and val."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                (folder / f"{number}.jpg").write_bytes(bytes([number]) * 10)
    return root


def found(report: Report, check: str) -> Finding:
    (finding,) = [f for f in report.findings if f.check == check and f.status != "ok"]
    assert finding.cure
    return finding


def examine_one(check, settings: Settings, topology: Topology = ALONE) -> Report:
    report = Report(0, "here")
    check(report, topology, settings)
    return report


# ---- faults of one machine ----


def test_fault_missing_data_folder(tmp_path):
    report = examine_one(local.check_data, Settings(data_path=str(tmp_path / "nowhere")))
    assert {"No such file" in f.what and "mount" in f.cure for f in report.findings} == {True}


def test_fault_unreadable_image(images):
    (images / "train/cat/0.jpg").unlink()
    (images / "train/cat/0.jpg").symlink_to("gone")
    finding = found(examine_one(local.check_data, Settings(data_path=str(images))), "data")
    assert str(images / "train/cat") in finding.what
    assert "scalesnn data check" in finding.cure


def test_fault_wrong_host_in_the_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nno-such-node.invalid slots=1\n")
    report = examine_one(local.check_hostfile, Settings(hostfile=str(hosts)))
    (finding,) = [f for f in report.findings if f.status == "fail"]
    assert finding.what.startswith("no-such-node.invalid: ")
    assert f"correct no-such-node.invalid in {hosts}" in finding.cure


def test_fault_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = found(examine_one(local.check_compiler, Settings()), "compiler")
    assert finding.what == "c++ and ninja not on PATH"
    assert "install g++" in finding.cure


def test_fault_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    crowd = Topology(local_world_size=8, world_size=8, source="torchrun")
    finding = found(examine_one(local.check_gpus, Settings(), crowd), "GPUs")
    assert (finding.status, finding.what) == ("fail", "8 processes, 4 GPU(s) visible")


def test_a_rank_looks_at_its_own_gpu(monkeypatch):
    chosen, timed = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(together, "time_of_work", lambda device: timed.append(device) or 0.1)
    third = Topology(local_rank=2, rank=2, local_world_size=4, world_size=4, source="torchrun")
    report = examine_one(local.check_gpus, Settings(), third)
    assert chosen == [2]
    assert report.facts["GPUs"] == ["GPU 2", 80, 4]
    store = HashStore()
    for rank in range(4):
        store.set(f"blocked/{rank}", "0")
    together.measure_network(report, third, Settings(), store)
    assert timed == [torch.device("cuda", 2)]


def test_a_rank_without_a_gpu_of_its_own_measures_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    crowd = Topology(local_rank=6, rank=6, local_world_size=8, world_size=8, source="torchrun")
    report = examine_one(local.check_gpus, Settings(), crowd)
    store = HashStore()
    for rank in range(8):
        store.set(f"blocked/{rank}", "0")
    together.measure_network(report, crowd, Settings(), store)
    assert "work" not in report.facts
    assert store.get("blocked/6") == b"1"


def test_fault_too_few_open_files():
    program = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    program += "from scalesnn.doctor import local; from scalesnn.doctor.findings import Report\n"
    program += "r = Report(0, 'here'); local.check_open_files(r, None, None); print(r.findings[0].what)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ(), timeout=60
    )
    assert done.stdout == "at most 256 open files (hard limit 256)\n"


@needs_unshare
def test_faults_full_disk_and_small_shared_memory(tmp_path):
    output = tmp_path / "runs"
    output.mkdir()
    done = run_apart(
        f"mount -t tmpfs -o size=256k none {output} && mount -t tmpfs -o size=16m none /dev/shm",
        [*DOCTOR, "--output-dir", str(output)],
    )
    assert done.returncode == 1
    assert row(done.stdout, "output") == [
        "output", "fail", f"{output}: No space left on device", "delete old runs, or give another "
        "--output-dir"
    ]  # fmt: skip
    assert row(done.stdout, "shared memory")[1:3] == ["warn", "/dev/shm has 0.016 GiB for 1 rank(s)"]
    assert row(done.stdout, "kernels")[1] == "ok"


def test_fault_too_little_space(tmp_path):
    finding = found(
        examine_one(local.check_output, Settings(output_dir=str(tmp_path), min_free=1e9)), "output"
    )
    assert "GiB free" in finding.what
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


def test_fault_output_that_is_a_file(tmp_path):
    (tmp_path / "runs").touch()
    found(examine_one(local.check_output, Settings(output_dir=str(tmp_path / "runs"))), "output")


def test_fault_no_such_master(capsys):
    topology = Topology(world_size=2, rank=1, nodes=2, node_rank=1, master_addr="no-such-master.invalid")
    assert command.examine(topology, Settings()) == 1
    assert "no-such-master.invalid (MASTER_ADDR): " in capsys.readouterr().out


def test_fault_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = Report(0, "here")
        assert command.meet(Topology(world_size=2, master_port=port), Settings(timeout=3), report) is None
        finding = found(report, "ports")
    assert finding.what.startswith(f"the port is taken 127.0.0.1:{port}")
    assert finding.cure == "give another MASTER_PORT"


def test_fault_blocked_port_between_nodes():
    """The meeting point is open, the other node's own port is not."""
    store, report = HashStore(), Report(1, "here", node_rank=1)
    store.set("clock/0", json.dumps(["127.0.0.1", free_port()]))
    together.try_ports(report, Topology(nodes=2, node_rank=1, rank=1, world_size=2), Settings(), store)
    finding = found(report, "ports")
    assert finding.what == "cannot connect to node 0: Connection refused"
    assert "firewall" in finding.cure


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(local, "check_versions", lambda *_: 1 / 0)
    report = local.look_at_this_machine(ALONE, Settings())
    assert "ZeroDivisionError" in found(report, "versions").what
    assert "open files" in report.done


# ---- faults between machines, from reports ----


def reports(count: int, **facts: list) -> list[Report]:
    """One report per rank, each rank a node of its own."""
    return [
        Report(rank, f"node-{rank}", rank, 0, {name: values[rank] for name, values in facts.items()})
        for rank in range(count)
    ]


def test_a_slow_device_is_named():
    (finding,) = compare(reports(4, work=[0.10, 0.11, 0.31, 0.10]), Settings())
    assert (finding.check, finding.rank) == ("speed", 2)
    assert finding.what == "the same work takes 3.1 times as long as elsewhere"


def test_of_two_devices_the_slower_is_named():
    assert slow_ones({0: 2.0, 1: 1.0}) == {0: 2.0}
    assert slow_ones({0: 1.1, 1: 1.0}) == {}


def test_a_slow_link_is_named():
    def pairs(node: int) -> dict:
        return {str(o): [1e-5, 2e9 if 3 in (node, o) else 2e10] for o in range(5) if o != node}

    findings = compare(reports(5, network=[pairs(n) for n in range(5)]), Settings())
    slow = [f for f in findings if f.status == "warn"]
    assert [f.rank for f in slow] == [3]
    assert slow[0].what == "2.00 GB/s to the other nodes, elsewhere 20.00"
    assert "node-3" in next(f.what for f in findings if f.status == "ok")


def test_a_node_with_other_gpus_is_named():
    gpus = [["H100", 80, 8], ["H100", 80, 8], ["A100", 40, 8], ["H100", 80, 8]]
    (finding,) = compare(reports(4, GPUs=gpus), Settings())
    assert (finding.rank, finding.what) == (2, "8 × A100, 40 GiB, elsewhere 8 × H100, 80 GiB")


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_in_a_tournament_everyone_meets_everyone_once(count):
    rounds = together.tournament(count)
    met = [tuple(sorted(pair)) for r in rounds for pair in r.items() if pair[0] < pair[1]]
    assert sorted(met) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert all(pairs[pairs[player]] == player for pairs in rounds for player in pairs)


def test_equal_findings_are_one_row(capsys):
    findings = [Finding("data", "fail", "gone", "mount it", rank) for rank in (0, 1, 2, 5)]
    print_table(findings, ["data", "clock"], {rank: f"n{rank // 2}" for rank in range(6)})
    text = capsys.readouterr().out
    assert text.count("gone") == 1
    assert "ranks 0-2,5 (3 hosts)" in text
    assert row(text, "clock")[1] == "ok"
    assert exit_code(findings) == 1
    assert exit_code([Finding("speed", "warn", "slow", "look", 1)]) == 0


# ---- real ranks ----


def environ(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "COLUMNS": "200", **more}


def run_apart(prepare: str, words: list[str], *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run with mounts (and with -n, a network) of its own."""
    shell = f"{prepare} && exec {shlex.join(words)}"
    return subprocess.run(
        ["unshare", "-m", *flags, "sh", "-c", shell],
        capture_output=True,
        text=True,
        timeout=120,
        env=environ(**more),
    )


def row(table: str, check: str) -> list[str]:
    """The cells of the first row for a check."""
    line = next(line for line in table.splitlines() if line.startswith(check + " "))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def two_ranks(
    first: list[str], second: list[str], **of_second: str
) -> tuple[tuple[int, str], tuple[int, str]]:
    """Run rank 0 and rank 1, as two nodes; returns exit code and output of each."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env=environ(**common, RANK=str(rank), **more))
        for rank, words, more in ((0, first, {}), (1, second, of_second))
    ]  # fmt: skip
    out = [process.communicate(timeout=150)[0] for process in processes]
    return (processes[0].returncode, out[0]), (processes[1].returncode, out[1])


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_two_healthy_ranks_have_no_findings(tmp_path, images):
    words = [*DOCTOR, "--data-path", str(images), "--output-dir", str(tmp_path / "runs"), "--min-free", "0.1"]
    (code, table), (other_code, other) = two_ranks(words, [*words])
    assert (code, other_code) == (0, 0), table
    assert "fail" not in table
    assert other.strip() == ""  # one table
    assert "GB/s" in " ".join(row(table, "network"))
    for check in ("ranks", "versions", "data", "output", "clock", "ports"):
        assert row(table, check)[1] == "ok"
    assert list((tmp_path / "runs").iterdir()) == []


LIKE_NCCL = """
import sys, torch.distributed as dist
from torch.distributed import TCPStore
from scalesnn.doctor import together
from scalesnn.doctor.local import Settings
from scalesnn.parallel.topology import Topology

rank, port = int(sys.argv[1]), int(sys.argv[2])
topology = Topology(nodes=2, node_rank=rank // 2, local_world_size=2, local_rank=rank % 2, rank=rank,
                    world_size=4, master_port=port, source="torchrun")
met, reduce, send = [], dist.all_reduce, dist.batch_isend_irecv
dist.all_reduce = lambda *a, **k: (reduce(*a, **k), met.append(1))
def pair(transfers):
    assert met, "NCCL would hang: its first call is one that not all ranks make"
    return send(transfers)
dist.batch_isend_irecv = pair
store = TCPStore("127.0.0.1", port, 4, is_master=rank == 0)
found = together.measure_pairs(topology, Settings(megabytes=0.1, timeout=60), store)
print(sorted(found))
"""


@pytest.mark.distributed
def test_all_ranks_take_part_in_the_first_call_of_a_group():
    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", LIKE_NCCL, str(rank), port], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env=environ(OMP_NUM_THREADS="1"))
        for rank in range(4)
    ]  # fmt: skip
    out = [process.communicate(timeout=100)[0] for process in ranks]
    assert out == ["['1']\n", "[]\n", "['0']\n", "[]\n"], out


@needs_unshare
@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_faults_of_the_second_of_two_nodes(tmp_path, images):
    """Another version, a wrong clock, other data, and an output folder of its own: each is found."""
    words = [*DOCTOR, "--data-path", str(images), "--output-dir", str(tmp_path / "runs"), "--min-free", "0"]
    (tmp_path / "runs").mkdir()
    planted = tmp_path / "planted"
    (planted / "deepspeed-0.0.1.dist-info").mkdir(parents=True)
    (planted / "deepspeed-0.0.1.dist-info/METADATA").write_text("Name: deepspeed\nVersion: 0.0.1\n")
    (planted / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() - 90\n"
    )
    other = tmp_path / "other"
    shutil.copytree(images, other)
    (other / "train/dog/1.jpg").unlink()
    mounts = f"mount --bind {other} {images} && mount -t tmpfs none {tmp_path / 'runs'}"
    second = ["unshare", "-m", "sh", "-c", f"{mounts} && exec {shlex.join(words)}"]
    (code, table), (other_code, _) = two_ranks(words, second, PYTHONPATH=f"{planted}:{ROOT}")
    assert (code, other_code) == (1, 1), table
    assert "deepspeed 0.0.1, elsewhere " in table
    assert "from one shared environment" in table
    assert "rank 1" in row(table, "clock")[2]
    assert "the clock is 90.0 s behind rank 0's" in table
    assert "chronyd" in table
    assert "the data differ: " in table
    assert "a file that rank 0 wrote there is not here" in table
    assert "a file system that all nodes share" in table
    assert row(table, "ports")[1] == "ok"


@needs_unshare
@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_fault_a_node_that_cannot_reach_the_first(tmp_path):
    """Rank 1 has no network: it says so itself, and rank 0 names the rank that did not come."""
    words = [*DOCTOR, "--timeout", "12"]
    second = ["unshare", "-n", *words]
    (code, table), (other_code, other) = two_ranks(words, second)
    assert (code, other_code) == (1, 1)
    assert row(table, "ranks")[2].startswith("rank 1 of 2 did not come within 12 s")
    assert "cannot reach 127.0.0.1:" in other
    assert "open the port" in other


def test_a_rank_that_is_late_is_waited_for():
    store, seen = HashStore(), []

    def late() -> None:
        time.sleep(0.5)
        store.set("first/1", "x")

    store.set("first/0", "x")
    thread = threading.Thread(target=late)
    thread.start()
    seen = together.wait_for_all(store, "first", 3, 1.5)
    thread.join()
    assert seen == [2]


def test_data_in_shards_are_looked_at(images, tmp_path):
    from scalesnn.cli import main

    assert main(["data", "pack", str(images), str(tmp_path / "packed"), "--quiet"]) == 0
    report = examine_one(local.check_data, Settings(data_path=str(tmp_path / "packed")))
    assert "1 shards" in report.facts["data"]
    (tmp_path / "packed/val/shard-000000.tar").unlink()
    assert found(examine_one(local.check_data, Settings(data_path=str(tmp_path / "packed"))), "data")
