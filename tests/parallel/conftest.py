"""Starting a few ranks on this machine, and the runs that many tests look at."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from scalesnn.parallel.topology import free_port

WORKER = Path(__file__).with_name("parallel_worker.py")
CONFIGS = WORKER.parents[2] / "configs"
Cells = dict[str, dict[str, Any]]
Finished = list["subprocess.CompletedProcess[str]"]


def zero(name: str, **more: Any) -> dict[str, Any]:
    """Flags of a shipped DeepSpeed configuration."""
    return {"deepspeed_config": str(CONFIGS / f"{name}.json"), **more}


def fsdp(name: str = "fsdp", **more: Any) -> dict[str, Any]:
    """Flags of a shipped FSDP2 configuration."""
    return {"fsdp_config": str(CONFIGS / f"{name}.yaml"), **more}


STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero0": zero("zero0"),
    "zero1": zero("zero1"),
    "zero2": zero("zero2"),
    "zero3": zero("zero3"),
    "fsdp": fsdp(),
}
RESUMED = ("ddp", "zero2", "zero3", "fsdp")


def rank_environment(rank: int, world_size: int, port: int | str) -> dict[str, str]:
    """What a launcher sets."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(WORKER.parents[2]),
    }


def start_ranks(world_size: int, command: list[str]) -> list[subprocess.Popen[str]]:
    """Start ``python COMMAND`` as every rank of a world."""
    port = free_port()
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=rank_environment(rank, world_size, port),
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish_ranks(processes: list[subprocess.Popen[str]], *, timeout: float = 240) -> Finished:
    """Wait for all ranks; kills those that are not done after ``timeout`` seconds."""
    finished = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            finished.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return finished


def run_cells(world_size: int, cells: Cells, folder: Path, *, timeout: float = 280) -> dict[str, Any]:
    """Run training cells on ``world_size`` ranks; returns rank 0's results by cell."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.json").write_text(json.dumps(cells))
    results = folder / "results.json"
    command = [str(WORKER), str(folder / "cells.json"), str(results)]
    for rank, process in enumerate(finish_ranks(start_ranks(world_size, command), timeout=timeout)):
        said = f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
        assert process.returncode == 0, f"rank {rank} of {world_size}: {said}"
    return dict(json.loads(results.read_text()))


def train_once(root: Path) -> dict[str, Any]:
    """All training runs of the comparison tests: one process, then two, then four."""

    def folder(name: str) -> str:
        return str(root / "runs" / name)

    one: Cells = {
        "single float64": {"dtype": "float64"},
        "single group": {"norm": "group", "flags": {"sync_bn": False}},
    }
    two: Cells = {
        "ddp float64": {"dtype": "float64"},
        "fsdp float64": {"dtype": "float64", "flags": fsdp()},
    }
    for name, flags in STRATEGIES.items():
        cell: dict[str, Any] = {"flags": flags}
        if name in RESUMED:
            cell |= {"folder": folder(name), "save": [10]}
        two[name] = cell
    for name in RESUMED:
        two[f"{name} accumulated"] = {
            "norm": "group",
            "flags": {**STRATEGIES[name], "gradient_accumulation": 2, "sync_bn": False},
        }
        two[f"{name} clipped"] = {"flags": {**STRATEGIES[name], "clip_grad_norm": 0.1}, "steps": 6}
        two[f"{name} adamw"] = {
            "flags": {**STRATEGIES[name], "opt": "adamw", "lr": 0.01},
            "folder": folder(f"{name} adamw"),
            "save": [3],
            "steps": 6,
        }
        two[f"{name} skip"] = {
            "flags": {**STRATEGIES[name], "on_nan": "skip"},
            "poison": 2,
            "steps": 6,
        }
        two[f"{name} stop"] = {"flags": STRATEGIES[name], "poison": 2, "steps": 6}
    for source, target in permutations(RESUMED, 2):
        two[f"{source} → {target}"] = {
            "flags": STRATEGIES[target],
            "resume": folder(f"{source}/step_00000010"),
            "folder": folder(f"{source} → {target}"),
            "seed": 99,
        }
    for source, target in (("ddp", "zero3"), ("zero2", "fsdp"), ("zero3", "zero2"), ("fsdp", "ddp")):
        two[f"adamw {source} → {target}"] = {
            "flags": {**STRATEGIES[target], "opt": "adamw", "lr": 0.01},
            "resume": folder(f"{source} adamw/step_00000003"),
            "folder": folder(f"adamw {source} → {target}"),
            "steps": 6,
            "seed": 99,
        }
    results = run_cells(2, two, root / "two")
    one["2 → 1"] = {
        "flags": STRATEGIES["ddp"] | {"sync_bn": True},
        "resume": folder("zero2/step_00000010"),
        "folder": folder("2 → 1"),
        "steps": 15,
        "save": [15],
        "seed": 99,
    }
    results |= run_cells(1, one, root / "one")
    (root / "hsdp.yaml").write_text(
        (CONFIGS / "hsdp.yaml").read_text().replace("replicas: auto", "replicas: 2")
    )
    four: Cells = {
        "hsdp float64": {"dtype": "float64", "flags": {"fsdp_config": str(root / "hsdp.yaml")}},
        "2 → 1 → 4": {
            "flags": fsdp(),
            "resume": folder("2 → 1/step_00000015"),
            "folder": folder("2 → 1 → 4"),
            "seed": 99,
        },
    }
    return results | run_cells(4, four, root / "four")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of ``train_once`` by name; made once, even where tests run in several workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    root = shared / "strategies"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache = root / "all.json"
        if not cache.exists():
            try:
                cache.write_text(json.dumps({"results": train_once(root)}))
            except Exception as error:
                cache.write_text(json.dumps({"failed": str(error)}))
                raise
        found = json.loads(cache.read_text())
    if "failed" in found:
        pytest.fail(f"the runs to compare failed: {found['failed']}")
    return dict(found["results"])


@pytest.fixture(scope="session")
def start() -> Callable[[int, list[str]], list[subprocess.Popen[str]]]:
    """``start_ranks``."""
    return start_ranks


@pytest.fixture(scope="session")
def finish() -> Callable[..., Finished]:
    """``finish_ranks``."""
    return finish_ranks
