"""Starting a few ranks on this machine, and the runs that many tests look at."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("parallel_worker.py")
CONFIGS = WORKER.parents[2] / "configs"
Cells = dict[str, dict[str, Any]]


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


@dataclass
class Rank:
    """How a rank ended, and what it said."""

    code: int
    out: str
    err: str


def run_worlds(worlds: list[dict[str, Any]], folder: Path, *, timeout: float = 280) -> list[list[Rank]]:
    """Run worlds ``{"size", "cells", "may_fail"}`` one after the other; their results go to FOLDER/NUMBER."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, world in enumerate(worlds):
        world["results"] = str(folder / str(number))
    (folder / "worlds.json").write_text(json.dumps(worlds))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(folder / "worlds.json")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = f"{process.communicate()[0]}\nnot done after {timeout} s"
    found = []
    for world in worlds:
        codes_file = Path(f"{world['results']}.codes")
        codes = json.loads(codes_file.read_text()) if codes_file.exists() else [None] * world["size"]
        ranks = [
            Rank(code, *(read(Path(f"{world['results']}.{rank}.{stream}")) for stream in ("out", "err")))
            for rank, code in enumerate(codes)
        ]
        if not world.get("may_fail"):
            for number, rank in enumerate(ranks):
                assert rank.code == 0, (
                    f"rank {number} ended with {rank.code}: {rank.err[-4000:]}\n{said[-2000:]}"
                )
        found.append(ranks)
    return found


def read(path: Path) -> str:
    """A text file's content; empty where there is none."""
    return path.read_text(errors="replace") if path.exists() else ""


def train_once(root: Path) -> dict[str, Any]:
    """All training runs of the comparison tests: one process, then two, then four."""

    def folder(name: str) -> str:
        return str(root / "runs" / name)

    group = {"norm": "group", "flags": {"sync_bn": False}, "dtype": "float64"}
    offload = (CONFIGS / "fsdp.yaml").read_text().replace("cpu_offload: false", "cpu_offload: true")
    (root / "offload.yaml").write_text(offload)
    one: Cells = {
        "single float64": {"dtype": "float64"},
        "single float32": {},
        "single torch": {"dtype": "float64", "norm": "torch", "steps": 8},
        "single group": {"norm": "group", "flags": {"sync_bn": False}, "images": 16},
        "batch 8": {**group, "images": 8},
        "2 × batch 4": {**group, "images": 8, "flags": {"sync_bn": False, "gradient_accumulation": 2}},
    }
    two: Cells = {
        "ddp float64": {"dtype": "float64"},
        "ddp torch": {"dtype": "float64", "norm": "torch", "steps": 8},
        "fsdp float64": {"dtype": "float64", "flags": fsdp()},
    }
    for name, flags in STRATEGIES.items():
        # Evaluations amid training leave no trace in it: ddp has none.
        cell: dict[str, Any] = {"flags": flags, "evaluate": name != "ddp"}
        if name in RESUMED:
            # zero3's in the background, while training goes on
            cell |= {"folder": folder(name), "save": [10], "background": name == "zero3"}
        two[name] = cell
    offloaded = {"flags": {"fsdp_config": str(root / "offload.yaml"), "clip_grad_norm": 0.1}, "steps": 6}
    two["fsdp offload"] = {**offloaded, "folder": folder("fsdp offload"), "save": [3]}
    two["fsdp offload again"] = {
        **offloaded,
        "resume": folder("fsdp offload/step_00000003"),
        "folder": folder("fsdp offload again"),
    }
    two["ddp static graph"] = {
        "norm": "group",
        "images": 16,
        "flags": {"ddp_static_graph": True, "gradient_accumulation": 2, "sync_bn": False},
        "steps": 6,
    }
    two["ddp bf16 gradients"] = {"flags": {"ddp_bf16_gradients": True}, "steps": 6}
    for name in RESUMED:
        two[f"{name} accumulated"] = {
            "norm": "group",
            "images": 16,
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
        two[f"{name} with other settings"] = {
            "flags": {**STRATEGIES[name], "lr": 0.02, "weight_decay": 0.05, "momentum": 0.5},
            "resume": folder(f"{name}/step_00000010"),
            "folder": folder(f"{name} with other settings"),
            "changed": ["lr", "weight_decay", "momentum"],
            "steps": 15,
        }
        two[f"{name} stop"] = {"flags": STRATEGIES[name], "poison": 2, "steps": 6}
    tuned = {
        "init_from": folder("zero3/step_00000010"),
        "freeze": ["conv.*", "bn.*", "layer1.0.*"],
        "lr_scale": ["layer1.1.*=0.1"],
        "steps": 6,
    }
    for name, flags in STRATEGIES.items():
        two[f"{name} tuned"] = {**tuned, "flags": flags, "folder": folder(f"{name} tuned"), "save": [6]}
    for source, target in (("ddp", "zero2"), ("zero3", "fsdp")):
        two[f"tuned {source} → {target}"] = {
            **tuned,
            "flags": STRATEGIES[target],
            "resume": folder(f"{source} tuned/step_00000006"),
            "folder": folder(f"tuned {source} → {target}"),
            "lr_scale": ["layer1.1.*=0.5"],
            "changed": ["lr_scale"],
            "steps": 8,
        }
    own = json.loads((CONFIGS / "zero2.json").read_text())
    own["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    (root / "own.json").write_text(json.dumps(own))
    two["zero2 own adamw"] = {
        "flags": {"deepspeed_config": str(root / "own.json"), "lr": 0.01},
        "steps": 6,
    }
    warmup = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 4}
    own["scheduler"] = {"type": "WarmupLR", "params": warmup}
    (root / "scheduled.json").write_text(json.dumps(own))
    scheduled = {"flags": {"deepspeed_config": str(root / "scheduled.json")}, "steps": 6}
    two["zero2 scheduled"] = {**scheduled, "folder": folder("scheduled"), "save": [2]}
    two["zero2 scheduled again"] = {
        **scheduled,
        "resume": folder("scheduled/step_00000002"),
        "folder": folder("scheduled again"),
    }
    with_own = {"lr": 0.01, "deepspeed_config": str(root / "own.json")}
    two["zero2 own adamw tuned"] = {**tuned, "flags": with_own, "steps": 2}
    two["zero2 scheduled tuned"] = {**tuned, "flags": scheduled["flags"], "steps": 2}
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
    one["2 → 1"] = {
        "flags": STRATEGIES["ddp"] | {"sync_bn": True},
        "resume": folder("zero2/step_00000010"),
        "folder": folder("2 → 1"),
        "steps": 15,
        "save": [15],
        "seed": 99,
    }
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
    worlds = [{"size": size, "cells": cells} for size, cells in ((2, two), (1, one), (4, four))]
    run_worlds(worlds, root)
    return {name: cell for world in worlds for name, cell in json.loads(read(Path(world["results"]))).items()}


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
def worlds() -> Callable[..., list[list[Rank]]]:
    """``run_worlds``."""
    return run_worlds
