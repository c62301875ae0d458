"""Which processor cores a rank computes on, and with how many threads.

With several ranks on one machine, each gets its own cores: those next to its GPU where /sys tells (the NUMA
node of the PCI device), else an equal run of cores in NUMA order. The data loader's processes inherit the
choice.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from scalesnn.parallel.topology import Topology

__all__ = [
    "add_placement_arguments",
    "bind_to_cores",
    "choose_cores",
    "gpu_numa_nodes",
    "numa_nodes",
    "place_process",
    "threads_per_rank",
]

SYSTEM = Path("/sys")


def numa_nodes(system: Path = SYSTEM) -> dict[int, set[int]]:
    """The processors of each NUMA node, from ``/sys/devices/system/node``; empty where it shows none."""
    nodes = {}
    for folder in (system / "devices/system/node").glob("node[0-9]*"):
        try:
            nodes[int(folder.name[4:])] = parse_cpulist((folder / "cpulist").read_text(encoding="utf-8"))
        except OSError:
            continue
    return dict(sorted(nodes.items()))


def siblings(system: Path, cpu: int) -> int:
    """The lowest processor number on the same core, so that hyper-threads of a core stay together."""
    try:
        text = (system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(
            encoding="utf-8"
        )
        return min(parse_cpulist(text))
    except (OSError, ValueError):
        return cpu


def gpu_numa_nodes(pci_addresses: Sequence[str], system: Path = SYSTEM) -> list[int | None]:
    """The NUMA node of each PCI device (``0000:17:00.0``); None where /sys does not know it."""
    found: list[int | None] = []
    for address in pci_addresses:
        try:
            node = int((system / f"bus/pci/devices/{address.lower()}/numa_node").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            node = -1
        found.append(node if node >= 0 else None)
    return found


def choose_cores(
    local_rank: int,
    local_world_size: int,
    allowed: set[int],
    *,
    near: Sequence[int | None] = (),
    system: Path = SYSTEM,
) -> set[int]:
    """The processors for one local rank.

    Args:
        allowed: processors that this process may use (the affinity that Slurm or a container gave it).
        near: the NUMA node of each local rank's GPU; empty or with None where not known.
        system: where /sys is.

    Returns:
        at least two of ``allowed``, apart from those of the other local ranks; all of ``allowed`` where that
        cannot be had (one rank, fewer than two processors a rank).
    """
    nodes = {n: cpus & allowed for n, cpus in numa_nodes(system).items() if cpus & allowed}
    if local_world_size == 1 or len(allowed) < 2 * local_world_size:
        return set(allowed)
    ranks: list[int] = list(range(local_world_size))
    pool = set(allowed)
    if len(near) == local_world_size and all(n in nodes for n in near):
        mine = near[local_rank]
        ranks = [r for r in ranks if near[r] == mine]
        pool = nodes[mine]  # type: ignore[index]
        if len(pool) < 2 * len(ranks):
            return pool
    home = {cpu: node for node, cpus in nodes.items() for cpu in cpus}
    order = sorted(pool, key=lambda cpu: (home.get(cpu, 0), siblings(system, cpu), cpu))
    place = ranks.index(local_rank)
    return set(order[place * len(order) // len(ranks) : (place + 1) * len(order) // len(ranks)])


def bind_to_cores(
    topology: Topology, near: Sequence[int | None] = (), environ: Mapping[str, str] = os.environ
) -> int:
    """Keep this process, and all that it starts, on its own cores; returns how many it has.

    Nothing is changed where Slurm has bound the tasks itself (SLURM_CPU_BIND with a list of masks), or
    where the system has no such call (macOS).
    """
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    if environ.get("SLURM_CPU_BIND_TYPE", "").startswith("mask") and environ.get("SLURM_CPU_BIND_LIST"):
        return len(allowed)
    chosen = choose_cores(topology.local_rank, topology.local_world_size, allowed, near=near)
    if chosen != allowed:
        os.sched_setaffinity(0, chosen)
    return len(chosen)


def threads_per_rank(topology: Topology, cores: int, environ: Mapping[str, str] = os.environ) -> int | None:
    """OMP threads of a rank: Slurm's cores per task, else its share of this node's ``cores``.

    None for a rank that has the machine to itself, or where OMP_NUM_THREADS is set: nothing is changed.
    """
    if environ.get("OMP_NUM_THREADS", "").isdigit():
        return None
    if topology.source == "slurm" and environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return max(1, int(environ["SLURM_CPUS_PER_TASK"]))
    if topology.local_world_size == 1:
        return None
    return max(1, cores // topology.local_world_size)


def physical_cores(cpus: set[int], system: Path = SYSTEM) -> int:
    """How many cores ``cpus`` lie on: two hyper-threads of one core count once."""
    return len({siblings(system, cpu) for cpu in cpus})


def gpu_addresses() -> list[str]:
    """PCI addresses of the GPUs that torch sees, in its order."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        gpu: Any = torch.cuda.get_device_properties(index)
        found.append(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")
    return found


def add_placement_arguments(parser: ArgumentParser) -> None:
    """Define ``--no-cpu-binding``."""
    parser.add_argument_group("placement").add_argument(
        "--no-cpu-binding", action="store_true", help="leave it to the system on which cores each rank runs"
    )


def place_process(
    topology: Topology, *, bind: bool = True, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Give this rank its threads and, with ``bind``, its cores; call it once, before any work."""
    import torch

    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    threads = threads_per_rank(topology, physical_cores(allowed), environ)
    if threads is not None:
        environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if bind:
        addresses = gpu_addresses() if torch.cuda.is_available() else []
        bind_to_cores(topology, gpu_numa_nodes(addresses[: topology.local_world_size]), environ)


def parse_cpulist(text: str) -> set[int]:
    """The kernel's ``0-3,8,10-11`` → {0, 1, 2, 3, 8, 10, 11}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
