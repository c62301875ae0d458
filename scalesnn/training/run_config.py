"""What a run says of its settings: RUN/config.yaml."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import scalesnn
from scalesnn.neuron import BaseNode
from scalesnn.training.run_name import plain

__all__ = ["describe_run", "write_config"]

PACKAGES = ("torch", "torchvision", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "cupy-cuda13x")


def describe_run(args: Any, model: nn.Module, **more: Any) -> dict[str, Any]:
    """Every resolved setting, the neurons in use, versions and git revision, as plain values."""
    settings = {
        k: v for k, v in sorted(vars(args).items()) if k not in ("explicit", "config", "print_config")
    }
    return {
        "settings": plain(settings),
        "neurons": describe_neurons(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": sys.argv,
        "versions": versions(),
        "git": git_revision(),
        **plain(more),
    }


def describe_neurons(model: nn.Module) -> list[dict[str, Any]]:
    """One entry for each kind of neuron: type, settings, surrogate, backend, and how many there are."""
    kinds: dict[str, dict[str, Any]] = {}
    for node in (m for m in model.modules() if isinstance(m, BaseNode)):
        entry = {
            "type": type(node).__name__,
            "settings": node.extra_repr(),
            "surrogate": repr(node.surrogate_function),
            "backend": node.backend,
            "step_mode": node.step_mode,
        }
        kinds.setdefault(str(entry), {**entry, "layers": 0})["layers"] += 1
    return list(kinds.values())


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "scalesnn": scalesnn.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_revision() -> str | None:
    """The commit of the code, with ``+`` where the work tree differs; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package, perhaps within somebody else's checkout
        return None
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.yaml; a resumed run keeps the earlier ones as config.1.yaml, config.2.yaml …"""
    path = folder / "config.yaml"
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1 + sum(1 for _ in folder.glob("config.[0-9]*.yaml"))
        path.rename(folder / f"config.{number}.yaml")
    path.write_text(text, encoding="utf-8")
