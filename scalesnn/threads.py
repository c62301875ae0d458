"""How OpenMP's threads wait for work; to be chosen before torch, which loads OpenMP, is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping

import psutil

__all__ = ["choose_wait_policy"]

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SAMPLE_S = 0.2


def idle_cores() -> float:
    """How many of the cores that this process may use were idle during the last ``SAMPLE_S`` seconds."""
    busy = psutil.cpu_percent(interval=SAMPLE_S, percpu=True)  # of all cores, in per cent
    return sum(1 - busy[core] / 100 for core in own_cores() if core < len(busy))


def own_cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def choose_wait_policy(
    environ: MutableMapping[str, str] = os.environ, idle: Callable[[], float] = idle_cores
) -> None:
    """Set OMP_WAIT_POLICY=passive where there are more OpenMP threads than idle cores.

    By default libgomp's threads spin at the end of every parallel region. On a quiet machine that is the
    fastest; beside other processes they take the cores from those and from each other
    (benchmarks/shared_machine.py measures both). Nothing is changed where the user has set how threads wait.

    Args:
        environ: what OpenMP will read; OMP_NUM_THREADS and LOCAL_WORLD_SIZE tell the number of threads.
        idle: measures the number of idle cores.
    """
    if any(name in environ for name in SETTINGS):
        return
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    ranks = environ.get("LOCAL_WORLD_SIZE", "")
    threads = (
        int(first)
        if first.isdecimal()
        else len(own_cores()) // max(1, int(ranks) if ranks.isdecimal() else 1)
    )
    if threads > 1 and threads > idle() + 0.5:
        environ["OMP_WAIT_POLICY"] = "passive"
