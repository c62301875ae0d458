"""Where the ranks meet: after ten seconds rank 0 says who is missing and why it may be."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from scalesnn.base import UserError
from scalesnn.parallel.start_again import again
from scalesnn.parallel.topology import Topology

__all__ = ["meet", "why_missing"]

SAY_AFTER = 10.0  # seconds
HERE, ALL = "scalesnn/here/{}", "scalesnn/all here"
SHELLS = ("bash", "sh", "zsh", "fish", "interactive")  # job names of an interactive srun


def meet(url: str, topology: Topology, timeout: timedelta) -> dist.Store:
    """The store through which all ranks met; returns when they all have.

    Args:
        url: ``env://``, or another of torch.distributed's.
        timeout: after which it is given up.

    Raises:
        UserError: ranks are missing at the end, or a rendezvous file is an earlier run's.
        RuntimeError, ValueError, dist.DistError: torch's, for a place where nobody can meet.
    """
    rank, world_size = topology.rank, topology.world_size
    place = f"{topology.master_addr}:{topology.master_port}" if url == "env://" else url
    text = f"rank {rank} has waited for {SAY_AFTER:.0f} s for rank 0 at {place}: {why_missing(topology)}"
    timer = threading.Timer(SAY_AFTER, say, [text])
    timer.daemon = True
    timer.start()
    try:
        if url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            store: Any = dist.TCPStore(
                topology.master_addr, topology.master_port, world_size, is_master=rank == 0,
                timeout=timeout, wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        else:
            store, _, _ = next(dist.rendezvous(url, rank, world_size, timeout=timeout))
            if not url.startswith("file:"):
                return store
    finally:
        timer.cancel()
    if world_size > 1:
        wait_for_all(store, url, topology, timeout, place)
    return store


def wait_for_all(store: Any, url: str, topology: Topology, timeout: timedelta, place: str) -> None:
    """Return when every rank has come to the store.

    Raises:
        UserError: some have not in time, or this rank has been here before, in an earlier run.
    """
    rank, began, said = topology.rank, time.monotonic(), False
    if told := again():  # the same processes, started again
        store = dist.PrefixStore(f"again-{told.count}", store)
    if url.startswith("file:") and store.check([HERE.format(rank)]):
        raise UserError(f"--dist-url {url}: an earlier run has left this file; delete it, or name another")
    store.set(HERE.format(rank), "1")
    everyone = [HERE.format(other) for other in range(topology.world_size)]
    while not store.check(everyone if rank == 0 else [ALL]):
        waited = time.monotonic() - began
        if rank == 0 and waited > SAY_AFTER and not said:
            said = True
            say(f"{missing(store, topology)} after {SAY_AFTER:.0f} s at {place}: {why_missing(topology)}")
        if waited > timeout.total_seconds():
            who = missing(store, topology)
            raise UserError(
                f"{who} after {waited / 60:.1f} minutes (--dist-timeout): {why_missing(topology)}"
            )
        time.sleep(0.1)
    if rank == 0:
        store.set(ALL, "1")


def missing(store: Any, topology: Topology) -> str:
    """``ranks 1, 2 and 5 more of 8 are missing``."""
    absent = [r for r in range(topology.world_size) if not store.check([HERE.format(r)])]
    shown = ", ".join(map(str, absent[:4])) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
    return f"rank{'s' * (len(absent) > 1)} {shown} of {topology.world_size} missing"


def why_missing(topology: Topology, environ: Mapping[str, str] = os.environ) -> str:
    """What the reason may be, by the launcher, and what to do."""
    count = topology.world_size
    if topology.source == "slurm" and environ.get("SLURM_JOB_NAME") in SHELLS:
        return (
            f"this is a shell that srun opened for {count} tasks, and python was started in one of them; "
            f"start `srun -n {count} python …` from outside of it, or for one process "
            "`env -u SLURM_STEP_ID python …`"
        )
    if topology.source == "environment":
        return (
            f"start one process for each RANK below WORLD_SIZE={count}; or unset RANK and WORLD_SIZE, if "
            "they are left over from another run"
        )
    return (
        "they may have ended (look at their output), may not have been started, or cannot reach that address "
        "(a firewall, another network: scalesnn doctor)"
    )


def say(text: str) -> None:
    """One line on standard error."""
    print(f"scalesnn: {text}", file=sys.stderr, flush=True)
