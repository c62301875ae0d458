"""What one rank sees of its own machine: versions, GPUs, compilers, kernels, data, output folder, limits."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scalesnn.base import UserError
from scalesnn.data.layout import find_layout
from scalesnn.data.listing import shards_of
from scalesnn.doctor.findings import Report
from scalesnn.parallel.devices import unusable_gpu
from scalesnn.parallel.topology import Topology

if TYPE_CHECKING:
    import torch

__all__ = ["Settings", "look_at_this_machine", "own_device", "time_of_work"]

PACKAGES = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "deepspeed": ("deepspeed",),
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x"),
    "numpy": ("numpy",),
}
SAMPLED_CLASSES = 16  # of a data set's classes, whose files are listed and of which one file each is read
GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """What the user wants checked.

    Attributes:
        data_path: folder with train and val, None to leave data out.
        output_dir: where runs are written, None to leave it out.
        min_free: GiB that must be free there.
        max_skew: seconds that clocks may differ.
        hostfile: DeepSpeed's host file, None to leave it out.
        megabytes: sent between two nodes to measure the bandwidth; 0 leaves the network's speed out.
        timeout: seconds to wait for the other ranks.
    """

    data_path: str | None = None
    output_dir: str | None = None
    min_free: float = 10.0
    max_skew: float = 1.0
    hostfile: str | None = None
    megabytes: float = 64.0
    timeout: float = 120.0


def look_at_this_machine(topology: Topology, settings: Settings) -> Report:
    """Make every check that needs no other rank."""
    report = Report(topology.rank, socket.gethostname(), topology.node_rank, topology.local_rank)
    checks: dict[str, Callable[[Report, Topology, Settings], None]] = {
        "versions": check_versions,
        "GPUs": check_gpus,
        "compiler": check_compiler,
        "kernels": check_kernels,
        "shared memory": check_shared_memory,
        "open files": check_open_files,
    }
    if settings.data_path is not None:
        checks["data"] = check_data
    if settings.output_dir is not None:
        checks["output"] = check_output
    if settings.hostfile is not None and topology.is_main:
        checks["host file"] = check_hostfile
    for name, check in checks.items():
        try:
            check(report, topology, settings)
        except Exception as error:  # a check that breaks is a finding: the others still help
            report.add(
                name, "fail", f"the check itself failed: {type(error).__name__}: {error}", "see the error"
            )
        report.done.append(name)
    return report


def check_versions(report: Report, topology: Topology, settings: Settings) -> None:
    """Versions of what must be alike on all ranks."""
    versions = {"python": platform.python_version(), "scalesnn": source_fingerprint()}
    for name, packages in PACKAGES.items():
        for package in packages:
            try:
                versions[name] = importlib.metadata.version(package)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
        else:
            versions[name] = "none"
    import torch

    versions["CUDA"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/proc/driver/nvidia/version")
        if driver.exists():
            versions["driver"] = driver.read_text(encoding="utf-8").split("Module", 1)[-1].split()[0]
    report.facts["versions"] = versions


def source_fingerprint() -> str:
    """Short hash of scalesnn's own source, so that a stale copy on one node shows."""
    import scalesnn

    folder = Path(scalesnn.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")) + sorted(folder.rglob("*.cu")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def check_gpus(report: Report, topology: Topology, settings: Settings) -> None:
    """As many GPUs as processes, with free memory."""
    import torch

    count = torch.cuda.device_count()
    report.facts["GPUs"] = []
    if count == 0:
        if problem := unusable_gpu():
            what, _, cure = problem.rpartition("; ")
            report.add("GPUs", "fail", what, cure)
        return
    if topology.local_world_size > count and not (count == 1 and topology.source == "slurm"):
        report.add("GPUs", "fail", f"{topology.local_world_size} processes, {count} GPU(s) visible",
                   "start as many processes per node as GPUs; look at CUDA_VISIBLE_DEVICES")  # fmt: skip
        return
    if topology.local_world_size < count and topology.world_size > 1:
        report.add("GPUs", "warn", f"{count} GPUs visible, {topology.local_world_size} process(es) use them",
                   f"start {count} processes per node, or the others stay idle")  # fmt: skip
    index = topology.device_index(count)
    torch.cuda.set_device(index)  # from here on everything that this rank tries is tried on its own GPU
    free, total = torch.cuda.mem_get_info(index)
    report.facts["GPUs"] = [torch.cuda.get_device_name(index), round(total / GIB), count]
    if free < 0.9 * total:
        report.add("GPUs", "warn", f"GPU {index}: {free / GIB:.0f} of {total / GIB:.0f} GiB are free",
                   "another process uses it: see nvidia-smi")  # fmt: skip


def check_compiler(report: Report, topology: Topology, settings: Settings) -> None:
    """DeepSpeed and the CPU kernels are built on first use."""
    missing = [name for name in ("c++", "ninja") if not shutil.which(name)]
    if missing:
        report.add("compiler", "fail", f"{' and '.join(missing)} not on PATH",
                   "install g++; put the environment's bin folder on PATH (ninja lies there)")  # fmt: skip


def check_kernels(report: Report, topology: Topology, settings: Settings) -> None:
    """Run a neuron layer forward and backward, fused where this machine can."""
    import torch

    from scalesnn import functional, neuron
    from scalesnn.kernels import cpu, self_check

    device = own_device(topology)
    if device.type == "cuda":
        problem = self_check.problem(device, torch.float32) or self_check.problem(device, torch.bfloat16)
    else:
        problem = None if cpu.available() else "the CPU kernels do not build"
    if problem:
        report.add("kernels", "warn", f"{problem}: plain torch will be used, several times slower",
                   "install the tested versions (make), and a C++ compiler")  # fmt: skip
    x = torch.randn(4, 2, 3, 5, 5, device=device, requires_grad=True)
    node = neuron.LIFNode(step_mode="m")
    node(x).sum().backward()
    functional.reset_net(node)
    if x.grad is None or not bool(torch.isfinite(x.grad).all()):
        report.add("kernels", "fail", "the gradient of a spiking layer is not finite", "report this as a bug")


def check_data(report: Report, topology: Topology, settings: Settings) -> None:
    """The folder of images: there, readable, and a fingerprint of it for the other nodes."""
    root = Path(str(settings.data_path)).expanduser()
    digest, what = hashlib.sha256(), "0 classes"
    try:
        layout = find_layout(root)
        shards = {folder: shards_of(folder) for folder in (layout.train, layout.val)}
    except UserError as error:
        report.add("data", "fail", str(error), "give the folder itself with --data-path")
        return
    for split, folder in (("train", layout.train), ("val", layout.val)):
        try:
            if shards[folder]:
                digest.update(repr([(file.name, file.stat().st_size) for file in shards[folder]]).encode())
                what = f"{len(shards[folder])} shards" if split == "train" else what
                continue
            classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except OSError as error:
            report.add("data", "fail", f"{folder}: {error.strerror}",
                       "mount the file system on this node, or give the --data-path that is right "
                       "there")  # fmt: skip
            continue
        if not classes:
            report.add(
                "data", "fail", f"{folder} holds no class folders", "--data-path needs train/CLASS/IMAGE"
            )
            continue
        digest.update(repr((split, classes)).encode())
        what = f"{len(classes)} classes" if split == "train" else what
        for name in classes[:: max(1, len(classes) // SAMPLED_CLASSES)]:
            try:
                files = sorted(entry.name for entry in os.scandir(folder / name))
                digest.update(repr((name, files)).encode())
                if files:
                    digest.update((folder / name / files[0]).read_bytes())
            except OSError as error:
                report.add("data", "fail", f"{folder / name}: {error.strerror or error}",
                           "repair or copy it again; `scalesnn data check` looks at every file")  # fmt: skip
                break
    report.facts["data"] = digest.hexdigest()[:12] + f" ({what})"


def check_output(report: Report, topology: Topology, settings: Settings) -> None:
    """The folder of runs can be written, really takes a megabyte, and has space."""
    folder = Path(str(settings.output_dir)).expanduser()
    probe = folder / f".doctor-{topology.rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(os.urandom(2**20))
    except OSError as error:
        cure = (
            "delete old runs, or give another --output-dir"
            if error.errno == 28
            else "give another --output-dir"
        )
        report.add("output", "fail", f"{folder}: {error.strerror}", cure)
        return
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    free = shutil.disk_usage(folder).free / GIB
    if free < settings.min_free:
        report.add("output", "fail", f"{folder}: {free:.2g} GiB free, --min-free {settings.min_free:g}",
                   "delete old runs, or give another --output-dir")  # fmt: skip


def check_shared_memory(report: Report, topology: Topology, settings: Settings) -> None:
    """Loader processes hand batches over in /dev/shm."""
    if not Path("/dev/shm").exists():
        return
    size = shutil.disk_usage("/dev/shm").total / GIB
    if size < 0.25 * topology.local_world_size:
        ranks = f"{topology.local_world_size} rank(s)"
        report.add("shared memory", "warn", f"/dev/shm has {size:.2g} GiB for {ranks}",
                   "docker run --shm-size=16g; in Kubernetes an emptyDir in Memory at /dev/shm")  # fmt: skip


def check_open_files(report: Report, topology: Topology, settings: Settings) -> None:
    """Loaders, sockets and shards need file descriptors."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        report.add("open files", "fail", f"at most {soft} open files (hard limit {hard})",
                   "ulimit -n 65536 in the job script, or LimitNOFILE for slurmd")  # fmt: skip


def check_hostfile(report: Report, topology: Topology, settings: Settings) -> None:
    """Every host of the file resolves and lets us in."""
    from scalesnn.launch_command import read_hostfile

    hosts = read_hostfile(str(settings.hostfile))
    for host in hosts:
        try:
            socket.getaddrinfo(host, 22)
        except OSError as error:
            report.add("host file", "fail", f"{host}: {error.strerror}",
                       f"correct {host} in {settings.hostfile}, or add it to DNS or /etc/hosts")  # fmt: skip
            continue
        try:
            socket.create_connection((host, 22), timeout=5).close()
        except OSError as error:
            report.add("host file", "warn", f"{host}: port 22: {error.strerror or error}",
                       "start sshd there (a port of your own belongs into ~/.ssh/config)")  # fmt: skip


def own_device(topology: Topology) -> torch.device:
    """The GPU of this rank, or the CPU where torch sees no GPU.

    Raises:
        UserError: more processes than GPUs on this node.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", topology.device_index(torch.cuda.device_count()))


def time_of_work(device: torch.device, seconds: float = 0.3) -> float:
    """Seconds that ``device`` takes for a fixed piece of computing: a median over ``seconds``."""
    import torch

    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device)
    times: list[float] = []
    (a @ a).sum().item()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 5:
        begin = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]
