"""What shows only between ranks: who came, clocks, ports, a shared folder, the network, slow nodes.

The ranks meet in a TCPStore, which works where a process group would hang: it also tells who is missing. Each
node's first rank then listens on a port of its own and tells its clock to whoever connects, so that one
connection tries the port and the clock together. Bandwidth is measured pair by pair, all pairs of a round
at once, in the rounds of a tournament: n - 1 rounds for n nodes.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import threading
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from scalesnn.doctor.compare import compare
from scalesnn.doctor.findings import Finding, Report, exit_code
from scalesnn.doctor.local import Settings, own_device, time_of_work
from scalesnn.parallel.topology import Topology
from scalesnn.training.hang_watch import short_list

__all__ = ["examine_together", "join_store", "tournament"]


def join_store(topology: Topology, settings: Settings, agent_store: bool) -> Any:
    """The store at the first node: made by rank 0, or torchrun's own where it keeps one (``agent_store``).

    Raises:
        RuntimeError: the first node cannot be reached there.
    """
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(
        topology.master_addr,
        topology.master_port,
        topology.world_size,
        is_master=topology.is_main and not agent_store,
        timeout=timedelta(seconds=settings.timeout),
        wait_for_workers=False,
    )
    return PrefixStore("scalesnn doctor", store)


def examine_together(
    topology: Topology, settings: Settings, report: Report, store: Any
) -> tuple[int, list[Finding], list[str], dict[int, str]]:
    """Compare all ranks' reports and try the network; every rank must call it.

    Returns:
        the exit code, the same on all ranks that came; and on rank 0 the findings of all ranks, the checks
        that were made, and the host of each rank.
    """
    with closing(Clock()) as clock:
        if topology.local_rank == 0:
            address = own_address(topology.master_addr)
            store.set(f"clock/{topology.node_rank}", json.dumps([address, clock.port]))
        store.set(f"first/{topology.rank}", json.dumps(report.to_json()))
        if topology.is_main:
            missing = wait_for_all(store, "first", topology.world_size, settings.timeout)
            token = None if missing else write_token(settings)
            store.set("go", json.dumps({"missing": missing, "token": token}))
        store.wait(["go"], timedelta(seconds=2 * settings.timeout))
        go = json.loads(store.get("go"))
        if not go["missing"]:
            look_for_token(report, settings, go["token"])
            try_ports(report, topology, settings, store)
            measure_network(report, topology, settings, store)
        store.set(f"second/{topology.rank}", json.dumps(report.to_json()))
        findings: list[Finding] = []
        done: list[str] = []
        places: dict[int, str] = {}
        if topology.is_main:
            if go["token"]:
                Path(go["token"]).unlink(missing_ok=True)
            present = [rank for rank in range(topology.world_size) if rank not in go["missing"]]
            late = wait_for_all(store, "second", topology.world_size, settings.timeout, present)
            reports = [
                Report.from_json(json.loads(store.get(f"second/{r}"))) for r in present if r not in late
            ]
            findings = compare(reports, settings)
            lost = sorted({*go["missing"], *late})
            if lost:
                findings.append(
                    Finding("ranks", "fail", f"rank{'s' * (len(lost) > 1)} {short_list(lost)} of "
                            f"{topology.world_size} did not come within {settings.timeout:g} s",
                            "see what they say themselves; are their nodes up, and can they reach "
                            f"{topology.master_addr}:{topology.master_port}?")
                )  # fmt: skip
            done = ["ranks", *dict.fromkeys(name for r in reports for name in r.done)]
            places = {r.rank: r.host for r in reports}
            store.set("verdict", str(exit_code(findings)))
        store.wait(["verdict"], timedelta(seconds=4 * settings.timeout))
        code = int(store.get("verdict"))
        say_goodbye(topology, store, len(go["missing"]))
        return code, findings, done, places


def wait_for_all(
    store: Any, name: str, world_size: int, timeout: float, ranks: list[int] | None = None
) -> list[int]:
    """The ranks whose ``name/RANK`` is not in the store after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    missing = []
    for rank in range(world_size) if ranks is None else ranks:
        try:
            store.wait([f"{name}/{rank}"], timedelta(seconds=max(0.05, end - time.monotonic())))
        except RuntimeError:
            missing.append(rank)
    return missing


def say_goodbye(topology: Topology, store: Any, missing: int) -> None:
    """Rank 0 keeps the store, so it ends last."""
    count = store.add("goodbye", 1)
    end = time.monotonic() + 10
    while topology.is_main and count < topology.world_size - missing and time.monotonic() < end:
        time.sleep(0.02)
        count = store.add("goodbye", 0)


def write_token(settings: Settings) -> str | None:
    """A new file in the output folder, for the other ranks to see; None where it cannot be written."""
    if settings.output_dir is None:
        return None
    path = Path(settings.output_dir).expanduser().resolve() / f".doctor-{secrets.token_hex(8)}"
    try:
        path.touch()
    except OSError:
        return None
    return str(path)


def look_for_token(report: Report, settings: Settings, token: str | None) -> None:
    """Whether what rank 0 wrote is here too; network file systems get a few seconds."""
    if token is None:
        return
    for _ in range(50):
        if Path(token).exists():
            return
        time.sleep(0.1)
    report.add("output", "fail", f"{settings.output_dir}: a file that rank 0 wrote there is not here",
               "give an --output-dir on a file system that all nodes share")  # fmt: skip


class Clock:
    """Listens on a free port and tells the time of day to everyone who connects."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="doctor's clock", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    connection.recv(1)
                    connection.sendall(struct.pack("!d", time.time()))
                except OSError:
                    continue

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def ask_clock(address: str, port: int, timeout: float) -> float:
    """Seconds that the clock there is ahead of ours, right to half of the round trip."""
    with socket.create_connection((address, port), timeout=timeout) as connection:
        connection.settimeout(timeout)
        before = time.time()
        connection.sendall(b"?")
        data = b""
        while len(data) < 8:
            part = connection.recv(8 - len(data))
            if not part:
                raise OSError("the connection was closed")
            data += part
        after = time.time()
    return float(struct.unpack("!d", data)[0]) - (before + after) / 2


def own_address(master_addr: str) -> str:
    """The address of this machine on the way to the first node, which the others can reach as well."""
    family, kind, _, _, target = socket.getaddrinfo(master_addr, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def try_ports(report: Report, topology: Topology, settings: Settings, store: Any) -> None:
    """Each node's first rank connects to every other node; every rank reads the first node's clock."""
    report.done += ["ports", "clock"]
    nodes = range(topology.nodes) if topology.local_rank == 0 else [0]
    for node in nodes:
        if node == topology.node_rank and node != 0:
            continue
        try:
            store.wait([f"clock/{node}"], timedelta(seconds=10))
            address, port = json.loads(store.get(f"clock/{node}"))
            ahead = ask_clock(address, port, timeout=10)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            report.add("ports", "fail", f"cannot connect to node {node}: {reason}",
                       "open all TCP ports between the nodes (firewall), or set NCCL_SOCKET_IFNAME and "
                       "GLOO_SOCKET_IFNAME to the network that joins them")  # fmt: skip
            continue
        if node == 0:
            report.facts["clock"] = -ahead


def measure_network(report: Report, topology: Topology, settings: Settings, store: Any) -> None:
    """Time a piece of work on each rank, and an all-reduce of each pair of nodes on their first ranks.

    Nothing is measured on a rank that has no GPU to itself, and no network where one rank has a fault.
    """
    faults = {finding.check for finding in report.findings if finding.status == "fail"}
    if "GPUs" not in faults:
        report.facts["work"] = time_of_work(own_device(topology))
        report.done.append("speed")
    blocked = bool(faults & {"ports", "GPUs"})
    store.set(f"blocked/{topology.rank}", "1" if blocked else "0")
    keys = [f"blocked/{rank}" for rank in range(topology.world_size)]
    store.wait(keys, timedelta(seconds=settings.timeout))
    if topology.nodes < 2 or settings.megabytes <= 0 or any(value == b"1" for value in store.multi_get(keys)):
        return
    report.done.append("network")
    try:
        report.facts["network"] = measure_pairs(topology, settings, store)
    except (RuntimeError, OSError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        report.add("network", "fail", f"the process group does not work: {text}",
                   "set NCCL_DEBUG=INFO and try again; see docs/cluster.md")  # fmt: skip


def measure_pairs(topology: Topology, settings: Settings, store: Any) -> dict[str, tuple[float, float]]:
    """(seconds of a tiny all-reduce, bytes per second of a large one) with each other node, by its number."""
    import torch
    import torch.distributed as dist

    device = own_device(topology)
    ours = not dist.is_initialized()
    if not ours and "nccl" not in dist.get_backend_config():
        device = torch.device("cpu")  # a run with --device cpu on a machine with GPUs
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ours:
        topology.export_environment()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timedelta(seconds=settings.timeout),
        )
    try:
        count = max(1, int(settings.megabytes * 1e6 / 4))
        small, large = torch.ones(1, device=device), torch.ones(count, device=device)
        dist.all_reduce(
            small.clone()
        )  # NCCL wants all ranks in a group's first call, also those without a pair
        node_of = {node: node * topology.local_world_size for node in range(topology.nodes)}
        found: dict[str, tuple[float, float]] = {}
        for pairs in tournament(topology.nodes):
            other = pairs.get(topology.node_rank)
            if topology.local_rank != 0 or other is None:
                continue
            partner = node_of[other]
            seconds = [
                min(pair_all_reduce(x, partner) for _ in range(n)) for x, n in ((small, 5), (large, 3))
            ]
            found[str(other)] = (seconds[0], large.nbytes / seconds[1])
        store.set(f"pairs/{topology.rank}", "done")
        store.wait([f"pairs/{r}" for r in range(topology.world_size)], timedelta(seconds=settings.timeout))
        return found
    finally:
        if ours:
            dist.destroy_process_group()


def pair_all_reduce(mine: Any, partner: int) -> float:
    """All-reduce ``mine`` with one other rank, and check the sum; returns the seconds it took."""
    import torch
    import torch.distributed as dist

    theirs = torch.zeros_like(mine)
    begin = time.perf_counter()
    transfers = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    total = mine + theirs
    if total.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if not bool((total == 2).all()):
        raise RuntimeError(f"the sum with rank {partner} is wrong: data is damaged on the way")
    return seconds


def tournament(count: int) -> list[dict[int, int]]:
    """Rounds in which everyone meets everyone once: for each round, the partner of each number."""
    players = [*range(count)] + ([-1] if count % 2 else [])
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [
            (a, b) for a, b in zip(players[:half], reversed(players[half:]), strict=True) if -1 not in (a, b)
        ]
        rounds.append({a: b for pair in pairs for a, b in (pair, pair[::-1])})
        players = [players[0], players[-1], *players[1:-1]]
    return rounds
