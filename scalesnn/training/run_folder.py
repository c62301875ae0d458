"""Where a run lives, OUTPUT_DIR/RUN/, and what it says of itself: config.yaml."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import scalesnn
from scalesnn.base import UserError
from scalesnn.neuron import BaseNode

__all__ = ["choose_folder", "describe_run", "write_config"]

PACKAGES = ("torch", "torchvision", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "cupy-cuda13x")


def choose_folder(output_dir: str, name: str, *, resume: str | None, clean: bool) -> Path:
    """The folder of this run; call it on one rank and tell the others.

    A name that is taken gets a number (``name-2``), so that nothing that was saved is written over;
    ``--resume latest`` takes the newest folder of that name, a path to a checkpoint takes the folder that the
    checkpoint stands in, and ``--clean`` deletes every folder of that name first.

    Raises:
        UserError: the output folder cannot be written.
    """
    parent = Path(output_dir).expanduser()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written ({error.strerror})") from None
    taken = taken_folders(parent, name)
    if clean:
        for folder in taken:
            shutil.rmtree(folder)
        taken = []
    if resume == "latest" and taken:
        return taken[-1]
    if resume not in (None, "latest"):
        found = [p for p in Path(str(resume)).resolve().parents if p.name == "checkpoints"]
        if found and found[0].parent.parent == parent.resolve():
            return found[0].parent
    if not taken:
        return parent / name
    if not (taken[-1] / "config.yaml").exists():  # a run that was refused before it began
        return taken[-1]
    return parent / f"{name}-{number_of(taken[-1], name) + 1}"


def taken_folders(parent: Path, name: str) -> list[Path]:
    """Folders ``name``, ``name-2``, ``name-3`` … below ``parent``, oldest first."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    folders = [p for p in parent.iterdir() if p.is_dir() and pattern.fullmatch(p.name)]
    return sorted(folders, key=lambda p: number_of(p, name))


def number_of(folder: Path, name: str) -> int:
    """1 for ``name``, 7 for ``name-7``."""
    return int(folder.name[len(name) + 1 :] or 1)


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
    if path.exists() and path.read_text() != text:
        number = 1 + sum(1 for _ in folder.glob("config.[0-9]*.yaml"))
        path.rename(folder / f"config.{number}.yaml")
    path.write_text(text)


def plain(value: Any) -> Any:
    """Reduce to what YAML and JSON hold."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
