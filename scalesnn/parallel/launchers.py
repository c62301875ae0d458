"""What each launcher says in the environment: one reader per launcher, all for ``topology.Topology``.

A reader returns the fields of ``Topology`` as a dict. Sources: srun(1), mpirun(1), torchrun's manual for its
environment variables, the Kubeflow training operator's PyTorchJob, and what DeepSpeed 0.19 sets.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from scalesnn.base import UserError

__all__ = [
    "DEFAULT_PORT",
    "Variables",
    "check_place",
    "expand_hostlist",
    "find_launcher",
    "interface_towards",
]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_PORT = 29500  # torch.distributed's
# What shows that somebody started several processes, for messages.
MARKS = (
    "TORCHELASTIC_RUN_ID",
    "CROSS_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "SLURM_STEP_ID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
)


class Variables:
    """The environment, with errors that name the variable; remembers which variable gave which field."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.names: dict[str, str] = {}

    def has(self, *names: str) -> bool:
        """Whether all of them are set (an empty one is not)."""
        return all(self.environ.get(name) for name in names)

    def number(self, field: str, *names: str, default: int | None = None) -> int:
        """The first of ``names`` that is set, which must be a whole number of at least 0; all must agree."""
        given = [name for name in names if self.environ.get(name)]
        if not given:
            if default is None:
                raise UserError(f"{' or '.join(names)} is not set, though {self.started_by()}")
            return default
        values = []
        for name in given:
            text = self.environ[name]
            if not re.fullmatch(r"\d+", text):
                raise UserError(f"{name}={text!r} in the environment is not a whole number of at least 0")
            values.append(int(text))
        for name, value in zip(given[1:], values[1:], strict=True):
            if value != values[0]:
                raise UserError(
                    f"{name}={value} contradicts {given[0]}={values[0]}; unset {name}, which is "
                    "probably left over "
                    "from a shell or a script"
                )
        self.names[field] = given[0]
        return values[0]

    def origin(self, field: str) -> str:
        """``LOCAL_RANK=3``: the variable that gave a field, for messages."""
        name = self.names.get(field)
        return f"{name}={self.environ[name]}" if name else field

    def started_by(self) -> str:
        """Which variables show that somebody started several processes."""
        marks = [name for name in MARKS if self.environ.get(name)]
        return " and ".join(f"{n}={self.environ[n]}" for n in marks[:2]) + " is"


def find_launcher(read: Variables) -> Callable[[Variables], dict[str, Any]]:
    """The reader for the innermost launcher whose marks are in the environment."""
    if read.has("TORCHELASTIC_RUN_ID"):
        return read_torchrun
    if read.has("CROSS_RANK", "CROSS_SIZE", "RANK"):
        return read_deepspeed
    if read.has("OMPI_COMM_WORLD_RANK") or read.has("PMI_RANK", "MPI_LOCALRANKID"):
        return read_mpi
    if read.has(
        "SLURM_STEP_ID", "SLURM_PROCID"
    ):  # SLURM_STEP_ID: a task of srun, not the batch script itself
        return read_slurm
    if read.has("PMIX_RANK") and not read.has("WORLD_SIZE"):
        return read_mpi
    if read.has("KUBERNETES_SERVICE_HOST", "RANK", "WORLD_SIZE") and not read.has("LOCAL_RANK"):
        return read_kubernetes
    if any(read.has(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return read_plain
    return read_nothing


def read_torchrun(read: Variables) -> dict[str, Any]:
    """torchrun and torch.distributed.launch (PET_* variables are for torchrun itself, not its children)."""
    place = {
        "source": "torchrun",
        "rank": read.number("rank", "RANK"),
        "world_size": read.number("world_size", "WORLD_SIZE"),
        "local_rank": read.number("local_rank", "LOCAL_RANK"),
        "local_world_size": read.number("local_world_size", "LOCAL_WORLD_SIZE"),
        "node_rank": read.number("node_rank", "GROUP_RANK"),
        "nodes": read.number("nodes", "GROUP_WORLD_SIZE"),
        **meeting_point(read),
    }
    tasks = read.number("tasks", "SLURM_STEP_NUM_TASKS", default=1) if read.has("SLURM_STEP_ID") else 1
    elastic = read.number("restarts", "TORCHELASTIC_MAX_RESTARTS", default=0) > 0
    if tasks > 1 and place["nodes"] == 1 and not elastic:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={tasks} contradicts GROUP_WORLD_SIZE=1: srun started {tasks} "
            "torchruns that know "
            f"nothing of each other; give torchrun --nnodes {tasks} and a --rdzv-endpoint"
        )
    return place


def read_deepspeed(read: Variables) -> dict[str, Any]:
    """The ``deepspeed`` command: CROSS_* count nodes."""
    return {
        "source": "deepspeed",
        "rank": read.number("rank", "RANK"),
        "world_size": read.number("world_size", "WORLD_SIZE"),
        "local_rank": read.number("local_rank", "LOCAL_RANK"),
        "local_world_size": read.number("local_world_size", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
        "node_rank": read.number("node_rank", "CROSS_RANK"),
        "nodes": read.number("nodes", "CROSS_SIZE"),
        **meeting_point(read),
    }


def read_mpi(read: Variables) -> dict[str, Any]:
    """OpenMPI, and MPICH and Intel MPI (PMI); their variables say nothing of nodes or of a meeting point."""
    if read.has("PMIX_RANK") and not read.has("OMPI_COMM_WORLD_RANK") and not read.has("PMI_RANK"):
        raise UserError(
            "PMIX_RANK is set, but neither OMPI_COMM_WORLD_SIZE nor WORLD_SIZE says how many processes "
            "there are; "
            "start with OpenMPI's mpirun, with srun, or export WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    rank = read.number("rank", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK")
    world = read.number("world_size", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
    local_rank = read.number("local_rank", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "LOCAL_RANK")
    local = read.number(
        "local_world_size", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE"
    )
    if local < 1 or world % local:
        raise UserError(
            f"{read.origin('world_size')} processes are not the same number on every node "
            f"({read.origin('local_world_size')}); give mpirun equal slots"
        )
    nodes = world // local
    if nodes > 1 and not read.has("MASTER_ADDR"):
        raise UserError(
            f"MASTER_ADDR is not set, and mpirun's variables do not tell where rank 0 runs ({nodes} nodes); "
            "give mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        )
    in_blocks = rank % local == local_rank
    return {
        "source": "openmpi",
        "rank": rank,
        "world_size": world,
        "local_rank": local_rank,
        "local_world_size": local,
        "node_rank": rank // local if in_blocks else rank % nodes,
        "nodes": nodes,
        **meeting_point(read),
    }


def read_slurm(read: Variables) -> dict[str, Any]:
    """A task of srun. RANK and the like may be set as well, if they say the same."""
    rank = read.number("rank", "SLURM_PROCID", "PMIX_RANK", "RANK")
    world = read.number("world_size", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE")
    nodes = read.number(
        "nodes", "SLURM_STEP_NUM_NODES", default=read.number("nodes", "SLURM_NNODES", default=1)
    )
    node_rank = read.number("node_rank", "SLURM_NODEID", default=0)
    per_node = read.environ.get("SLURM_STEP_TASKS_PER_NODE") or read.environ.get("SLURM_TASKS_PER_NODE", "")
    counts = expand_counts(per_node)
    if len(counts) != nodes or sum(counts) != world:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={per_node!r} contradicts SLURM_STEP_NUM_NODES={nodes} and "
            f"SLURM_STEP_NUM_TASKS={world}; start the training with srun, not with a copy of another "
            "job's variables"
        )
    if node_rank >= nodes:
        raise UserError(f"SLURM_NODEID={node_rank} contradicts SLURM_STEP_NUM_NODES={nodes}")
    job = read.number("job", "SLURM_JOB_ID", default=0)
    step = read.environ.get("SLURM_STEP_ID", "0")
    names = expand_hostlist(read.environ.get("SLURM_STEP_NODELIST") or read.environ.get("SLURM_NODELIST", ""))
    meeting = meeting_point(read)
    if not read.has("MASTER_ADDR"):
        meeting["master_addr"] = "127.0.0.1" if nodes == 1 or not names else node_address(names[0])
    if not read.has(
        "MASTER_PORT"
    ):  # below the ephemeral ports, and apart for jobs and steps that share a node
        meeting["master_port"] = 10000 + (job * 7 + (int(step) if step.isdigit() else 0)) % 20000
    return {
        "source": "slurm",
        "rank": rank,
        "world_size": world,
        "local_rank": read.number("local_rank", "SLURM_LOCALID", "LOCAL_RANK"),
        "local_world_size": counts[node_rank],
        "node_rank": node_rank,
        "nodes": nodes,
        **meeting,
    }


def read_kubernetes(read: Variables) -> dict[str, Any]:
    """A pod of the training operator that runs python itself: one process per pod."""
    processes = read.environ.get("PET_NPROC_PER_NODE", "1")
    if processes != "1":
        raise UserError(
            f"PET_NPROC_PER_NODE={processes} asks for several processes in this pod, but it runs python "
            "itself; "
            "let the pod run 'torchrun launch/train.py …', which reads the PET_ variables"
        )
    rank, world = read.number("rank", "RANK"), read.number("world_size", "WORLD_SIZE")
    if (
        read.has("PET_NNODES")
        and read.environ["PET_NNODES"].isdigit()
        and int(read.environ["PET_NNODES"]) != world
    ):
        raise UserError(f"WORLD_SIZE={world} contradicts PET_NNODES={read.environ['PET_NNODES']}")
    if world > 1 and not read.has("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR is not set, though WORLD_SIZE={world}; the training operator sets it")
    place = {"rank": rank, "world_size": world, "nodes": world, "node_rank": rank}
    return {"source": "kubernetes", "local_rank": 0, "local_world_size": 1, **place, **meeting_point(read)}


def read_plain(read: Variables) -> dict[str, Any]:
    """torch's own variables, set by hand or by an unknown launcher."""
    world = read.number("world_size", "WORLD_SIZE", default=1 if not read.has("RANK") else None)
    rank = read.number("rank", "RANK", default=0 if world == 1 else None)
    meeting = meeting_point(read)
    addr = meeting["master_addr"]
    if world > 1 and not read.has("MASTER_ADDR"):
        raise UserError(
            f"MASTER_ADDR is not set, though WORLD_SIZE={world}; start with torchrun, or export it"
        )
    one_node = world if addr in LOOPBACK or addr.startswith("127.") else None
    local = read.number(
        "local_world_size", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=1 if world == 1 else one_node
    )
    local_rank = read.number("local_rank", "LOCAL_RANK", default=rank if local == world else None)
    if local < 1 or world % local:
        raise UserError(f"WORLD_SIZE={world} is not a multiple of {read.origin('local_world_size')}")
    place = {"rank": rank, "world_size": world, "local_rank": local_rank, "local_world_size": local}
    node_rank = read.number("node_rank", "NODE_RANK", "GROUP_RANK", default=rank // local)
    return {"source": "environment", **place, "nodes": world // local, "node_rank": node_rank, **meeting}


def read_nothing(read: Variables) -> dict[str, Any]:
    """No launcher: one process. Its port is a free one, so that two of them can share a machine."""
    place = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "nodes": 1, "node_rank": 0}
    port = read.number("master_port", "MASTER_PORT", default=0)
    return {"source": "single", **place, "master_addr": "127.0.0.1", "master_port": port}


def meeting_point(read: Variables) -> dict[str, Any]:
    """MASTER_ADDR and MASTER_PORT, or this machine and torch's usual port."""
    return {
        "master_addr": read.environ.get("MASTER_ADDR") or "127.0.0.1",
        "master_port": read.number("master_port", "MASTER_PORT", default=DEFAULT_PORT),
    }


def check_place(place: dict[str, Any], read: Variables) -> None:
    """Refuse numbers that cannot all be true."""
    for part, whole in (("rank", "world_size"), ("local_rank", "local_world_size"), ("node_rank", "nodes")):
        if place[part] >= place[whole]:
            given = read.origin(part) if part in read.names else f"{part} {place[part]}"
            of = read.origin(whole) if whole in read.names else f"{whole} {place[whole]}"
            raise UserError(f"{given} contradicts {of}: it must be smaller")
    if place["local_world_size"] > place["world_size"]:
        raise UserError(
            f"{read.origin('local_world_size')} contradicts {read.origin('world_size')}: it is larger"
        )
    if place["master_port"] > 65535:
        raise UserError(f"MASTER_PORT={place['master_port']} is not a port (1 to 65535)")
    in_pod = read.has("KUBERNETES_SERVICE_HOST") and place["source"] != "slurm"
    if in_pod and place["nodes"] > 1 and place["master_addr"] in LOOPBACK:
        raise UserError(
            f"MASTER_ADDR={place['master_addr']} is this pod itself, but there are {place['nodes']} pods; "
            "the training operator sets MASTER_ADDR to the master pod's service"
        )


def expand_counts(text: str) -> list[int]:
    """Slurm's ``2(x3),1`` → [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form '2(x3),1'")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def expand_hostlist(text: str) -> list[str]:
    """Slurm's ``gpu[01-03,7],login`` → [gpu01, gpu02, gpu03, gpu7, login].

    Raises:
        UserError: brackets that do not close, or a range that is none.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text:
        raise UserError(f"{text!r} is not a list of hosts in Slurm's form")
    names: list[str] = []
    for part in parts:
        grown = [""]
        for piece in re.split(r"(\[[^\]]*\])", part):
            choices = expand_range(piece[1:-1], text) if piece.startswith("[") else [piece]
            grown = [start + choice for start in grown for choice in choices]
        names += grown
    return names


def expand_range(text: str, whole: str) -> list[str]:
    """``01-03,7`` → [01, 02, 03, 7]: the width of a range's first number is kept."""
    found: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and (not last.isdigit() or int(last) < int(first))):
            raise UserError(f"{whole!r} is not a list of hosts in Slurm's form: {part!r}")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last if dash else first) + 1)]
    return found


def node_address(name: str) -> str:
    """``name`` where it resolves, else Slurm's address of the node (containers often lack the names)."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        if shutil.which("scontrol"):
            try:
                shown = subprocess.run(
                    ["scontrol", "show", "node", name, "--oneliner"],
                    capture_output=True,
                    text=True,
                    timeout=20,
                )
            except subprocess.TimeoutExpired:
                return name
            if found := re.search(r"\bNodeAddr=(\S+)", shown.stdout):
                return found[1]
    return name


def interface_towards(address: str) -> str | None:
    """Name of the network interface that packets to ``address`` leave by; None where nothing tells."""
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
            probe.connect(target)
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return "lo"
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in entries):
            return name
    return None
