"""Several hosts without Slurm, on one machine: two network namespaces for torchrun, sshd and pdsh for host
files, and the pods of the Kubernetes manifest as processes with the operator's variables."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_testbed import ROOT, trace, training_flags, wait_until

from scalesnn.parallel.topology import free_port

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.distributed,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(600),
]

MANIFEST = ROOT / "launch/k8s/pytorchjob.yaml"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environ(**more: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR",
             "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("SLURM_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**clean, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def two_hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a veth pair: the words that run a command in each."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("needs root and iproute2 (network namespaces)")
    a, b = f"sa{os.getpid()}", f"sb{os.getpid()}"
    lines = [
        f"netns add {a}", f"netns add {b}", f"link add va netns {a} type veth peer name vb netns {b}",
        f"-n {a} addr add 10.77.0.1/24 dev va", f"-n {b} addr add 10.77.0.2/24 dev vb",
        *(f"-n {ns} link set {dev} up" for ns, dev in ((a, "va"), (b, "vb"), (a, "lo"), (b, "lo"))),
    ]  # fmt: skip
    try:
        for line in lines:
            done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield [["ip", "netns", "exec", name] for name in (a, b)]
    finally:
        for name in (a, b):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.long
def test_torchrun_on_two_hosts(two_hosts, few_images, tmp_path):
    """As docs/cluster.md has it; the interface towards the other host is found by scalesnn."""
    flags = training_flags(few_images, tmp_path / "runs", "--max-steps", "3", "--run-name", "two")
    processes = [
        subprocess.Popen(
            [*host, *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-conf", f"is_host={int(number == 0)}",
             "--local-addr", f"10.77.0.{number + 1}", str(ROOT / "launch/train.py"), *flags],
            env=environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number, host in enumerate(two_hosts)
    ]  # fmt: skip
    out = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert len(trace(tmp_path / "runs/two")) == 3


@pytest.mark.long
def test_the_doctor_measures_the_link_of_two_hosts(two_hosts):
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.77.0.1",
              "MASTER_PORT": "29511", "COLUMNS": "200"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [*host, sys.executable, "-m", "scalesnn.cli", "doctor", "--timeout", "60"],
            env=environ(**common, RANK=str(rank)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(two_hosts)
    ]  # fmt: skip
    out = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert "GB/s and " in out[0]


@pytest.fixture
def sshd(tmp_path) -> Iterator[Path]:
    """An sshd on 127.0.0.11 and 127.0.0.12 with a key of its own; gives ssh's configuration file."""
    if not all(shutil.which(name) for name in ("sshd", "pdsh", "ssh-keygen")) or os.geteuid() != 0:
        pytest.skip("needs root, openssh-server and pdsh")
    folder = Path(subprocess.check_output(["mktemp", "-d", "-t", "sshd.XXXXXX"], text=True).strip())
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    port = free_port()
    options = {"ListenAddress": "127.0.0.11", "AuthorizedKeysFile": folder / "authorized",
               "StrictModes": "no", "UsePAM": "no", "PidFile": folder / "pid"}  # fmt: skip
    words = [f"-o{name}={value}" for name, value in options.items()] + ["-oListenAddress=127.0.0.12"]
    server = subprocess.Popen(
        [
            shutil.which("sshd") or "sshd",
            "-D",
            "-f",
            "/dev/null",
            "-h",
            str(folder / "host"),
            "-p",
            str(port),
            *words,
        ]
    )
    config = folder / "config"
    config.write_text(
        f"Host *\n  Port {port}\n  IdentityFile {folder}/user\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {folder}/known\n  LogLevel ERROR\n"
    )
    wait_until(lambda: answers("127.0.0.12", port), 20, "sshd listens")
    yield config
    server.terminate()
    server.wait(10)
    shutil.rmtree(folder, ignore_errors=True)


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.long
def test_launch_with_a_hostfile_trains_on_both_hosts(sshd, few_images, tmp_path):
    """scalesnn launch --hostfile → DeepSpeed's launcher → pdsh → ssh, ZeRO-2."""
    (tmp_path / "hosts").write_text("127.0.0.11 slots=1\n127.0.0.12 slots=1\n")
    flags = training_flags(few_images, tmp_path / "runs", "--max-steps", "3", "--run-name", "two")
    done = subprocess.run(
        [sys.executable, "-m", "scalesnn.cli", "launch", "--hostfile", "hosts", "--master-addr", "127.0.0.11",
         "--master-port", str(free_port()), "--no-ssh-check",
         "--deepspeed_config", str(ROOT / "configs/zero2.json"), *flags],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=environ(PDSH_SSH_ARGS_APPEND=f"-F {sshd}"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(trace(tmp_path / "runs/two")) == 3
    assert {path.name for path in (tmp_path / "runs/two/logs").iterdir()} == {"rank_0.log", "rank_1.log"}


@pytest.mark.long
def test_torchrun_starts_a_killed_training_again(few_images, tmp_path):
    """scalesnn launch --max-restarts: SIGKILL of a worker, and the run goes on from its checkpoint."""
    flags = training_flags(few_images, tmp_path / "runs", "--save-every", "2", "--run-name", "again")
    process = subprocess.Popen(
        [sys.executable, "-m", "scalesnn.cli", "launch", "--devices", "1", "--max-restarts", "1", *flags],
        env=environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    metrics = tmp_path / "runs/again/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(trace(metrics.parent)) >= 5, 200, "at step 5")
    os.kill(worker_of(process.pid), signal.SIGKILL)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out[-3000:]
    assert sorted(trace(metrics.parent)) == list(range(1, 37))  # 36 images, 4 a step, 4 epochs
    assert "resumed from" in out


@pytest.mark.long
def test_half_of_the_devices_take_as_many_steps_of_as_many_images(few_images, tmp_path):
    """--global-batch: two ranks begin, one goes on with twice the accumulation."""
    flags = training_flags(few_images, tmp_path / "runs", "--global-batch", "8", "--run-name", "half")
    launch = [sys.executable, "-m", "scalesnn.cli", "launch"]
    for words in (
        ["--devices", "2", *flags, "--max-steps", "6"],
        ["--devices", "1", *flags, "--resume", "latest"],
    ):
        subprocess.run([*launch, *words], env=environ(), check=True, timeout=240, cwd=tmp_path)
    assert sorted(trace(tmp_path / "runs/half")) == list(range(1, 17))
    lines = (tmp_path / "runs/half/metrics.jsonl").read_text().splitlines()
    seen = [r["images_seen"] for r in map(json.loads, lines) if r["kind"] == "step"]
    assert seen == [8 * step for step in range(1, 17)]


def worker_of(launcher: int) -> int:
    """The training process below a launcher."""
    import psutil

    workers = [
        p for p in psutil.Process(launcher).children(recursive=True)
        if "launch/train.py" in " ".join(p.cmdline()) and "torch.distributed.run" not in " ".join(p.cmdline())
    ]  # fmt: skip
    return workers[0].pid


def test_the_manifest_is_what_the_operator_expects():
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for role in ("Master", "Worker"):
        assert replicas[role]["restartPolicy"] == "OnFailure"
        pod = replicas[role]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_manifest_s_flags_are_known():
    """The training's own parser takes the container's command."""
    from scalesnn.model.train_imagenet_example import SResNetTrainer

    job = yaml.safe_load(MANIFEST.read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    assert container["command"][:2] == ["torchrun", "launch/train.py"]
    args = SResNetTrainer().get_args_parser().parse_args(container["command"][2:])
    assert args.resume == "latest"


@pytest.mark.long
def test_the_manifest_s_command_trains_in_two_pods(few_images, tmp_path):
    """Two processes with the operator's variables run the container's command, on our data."""
    job = yaml.safe_load(MANIFEST.read_text())
    command = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"]
    flags = training_flags(few_images, tmp_path / "runs", "--max-steps", "3", "--run-name", "pods")
    port = free_port()
    processes = []
    for number in range(2):
        pod = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(number),
               "RANK": str(number), "WORLD_SIZE": "2", "PET_MASTER_ADDR": "127.0.0.2",
               "PET_MASTER_PORT": str(port),
               "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port),
               "KUBERNETES_SERVICE_HOST": "10.96.0.1"}  # fmt: skip
        words = [
            word for word in command if not word.startswith(("--data-path", "--output-dir", "--run-name"))
        ]
        processes.append(subprocess.Popen([*words, *flags], cwd=ROOT, env=environ(**pod)))
        time.sleep(1)
    assert [process.wait(300) for process in processes] == [0, 0]
    assert len(trace(tmp_path / "runs/pods")) == 3
