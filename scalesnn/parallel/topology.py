"""Where this process stands among all the processes of a training, however they were started.

One object, ``Topology``, is read from the variables that srun, torchrun, the DeepSpeed launcher, mpirun or
the Kubernetes training operator leave in the environment; without any of them the training is one process.
The innermost launcher wins (torchrun started by srun is torchrun), and two variables that contradict each
other are an error that names both, since the alternative is a job that hangs on all its nodes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalesnn.base import UserError
from scalesnn.parallel.launchers import DEFAULT_PORT, Variables, check_place, find_launcher, interface_towards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Topology", "free_port"]


@dataclass(frozen=True)
class Topology:
    """The place of one process.

    Attributes:
        nodes, node_rank: how many machines (for srun and torchrun: as those count them), and which this is.
        local_world_size, local_rank: processes on this machine, and which of them this is.
        world_size, rank: processes in all, and which of them this is.
        master_addr, master_port: where the processes meet.
        source: who started the process: slurm, torchrun, deepspeed, openmpi, kubernetes, environment (RANK,
            WORLD_SIZE and LOCAL_RANK set by hand) or single (nobody).
        interface: name of the network interface towards ``master_addr``; None where it could not be found.
    """

    nodes: int = 1
    node_rank: int = 0
    local_world_size: int = 1
    local_rank: int = 0
    rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    source: str = "single"
    interface: str | None = None

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] = os.environ, *, local_rank_flag: int | None = None
    ) -> Topology:
        """Read the environment.

        Args:
            environ: the variables.
            local_rank_flag: value of ``--local_rank``, which the DeepSpeed launcher passes; None where not
                given.

        Raises:
            UserError: variables are missing, are not numbers or contradict each other; the message names
                them.
        """
        read = Variables(environ)
        place = find_launcher(read)(read)
        if local_rank_flag is not None and local_rank_flag >= 0:
            if "LOCAL_RANK" not in environ and place["source"] in ("environment", "kubernetes", "single"):
                place["local_rank"] = local_rank_flag
            elif local_rank_flag != place["local_rank"]:
                raise UserError(
                    f"--local_rank={local_rank_flag} contradicts {read.origin('local_rank')}; "
                    "the launcher sets it, leave the flag out"
                )
        check_place(place, read)
        addr, port = place["master_addr"], place["master_port"]
        interface = environ.get("GLOO_SOCKET_IFNAME") or environ.get("NCCL_SOCKET_IFNAME")
        if interface is None:
            interface = "lo" if place["nodes"] == 1 else interface_towards(addr)
        return cls(**{**place, "master_port": port or free_port(), "interface": interface})

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_block_order(self) -> bool:
        """Whether the ranks of one node follow each other (true of every launcher unless told otherwise)."""
        return self.rank == self.node_rank * self.local_world_size + self.local_rank

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed and DeepSpeed read, for this process."""
        variables = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "LOCAL_SIZE": self.local_world_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        return {name: str(value) for name, value in variables.items()}

    def export_environment(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set ``environment()`` in ``environ``, and gloo's and NCCL's interfaces unless the user chose.

        NCCL uses InfiniBand or RoCE for its data where there is any; the interface only carries its first
        contact then. Setting NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME beforehand overrides the choice.
        """
        environ.update(self.environment())
        if self.interface and self.nodes > 1:
            environ.setdefault("GLOO_SOCKET_IFNAME", self.interface)
            environ.setdefault("NCCL_SOCKET_IFNAME", self.interface)
        elif self.interface:
            environ.setdefault("GLOO_SOCKET_IFNAME", self.interface)

    def device_index(self, visible: int) -> int:
        """Which of the ``visible`` GPUs of this process is its own.

        Raises:
            UserError: more processes than GPUs on this node.
        """
        if visible >= self.local_world_size:
            return self.local_rank
        if (
            visible == 1 and self.source == "slurm"
        ):  # --gpus-per-task=1: every task sees its own GPU as number 0
            return 0
        raise UserError(
            f"{self.local_world_size} processes on node {self.node_rank}, but torch sees {visible} "
            "GPU(s) there; "
            "start as many processes per node as there are GPUs (and look at CUDA_VISIBLE_DEVICES)"
        )

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """(nodes, devices of a node): replicas lie across nodes, shards within one, where links are fast.

        Raises:
            UserError: nodes with different numbers of processes, or ranks dealt out in turns.
        """
        if self.nodes * self.local_world_size != self.world_size:
            raise UserError(
                "a node × device mesh needs the same number of processes on every node, got "
                f"{self.world_size} "
                f"on {self.nodes} nodes with {self.local_world_size} on this one"
            )
        if not self.is_block_order:
            raise UserError(
                f"a node × device mesh needs ranks in blocks, but rank {self.rank} is number "
                f"{self.local_rank} on "
                f"node {self.node_rank}; give srun --distribution=block (mpirun --map-by slot)"
            )
        return self.nodes, self.local_world_size

    def device_mesh(self, device_type: str, names: tuple[str, str] = ("replicate", "shard")) -> DeviceMesh:
        """The mesh of ``mesh_shape`` for FSDP2's hybrid sharding; the process group must be up.

        Raises:
            UserError: see ``mesh_shape``.
        """
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device_type, self.mesh_shape, mesh_dim_names=names)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
