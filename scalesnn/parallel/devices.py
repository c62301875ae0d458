"""Whether torch can use the NVIDIA GPUs of this machine, and if not, what keeps it from them.

A run that finds no usable GPU would train on the CPU, a hundred times slower: where there is a GPU, that is
said instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import torch

from scalesnn.base import UserError

__all__ = ["check_gpu", "first_line", "unusable_gpu", "use_expandable_segments"]

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def unusable_gpu(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str | None:
    """What keeps torch from this machine's NVIDIA GPUs, and what to do, in one line.

    Args:
        environ: the variables.
        root: where /dev and /proc are.

    Returns:
        None where torch sees a GPU, or where the machine has none.
    """
    if torch.cuda.is_available():
        return None
    found = nvidia_devices(environ, root)
    if not found:
        return None
    return f"this machine has an NVIDIA GPU ({found[0]}), but torch cannot use it: {_cause(environ, root)}"


def nvidia_devices(environ: Mapping[str, str], root: Path) -> list[str]:
    """The NVIDIA GPUs of this machine: device files, or else what nvidia-smi lists (under WSL there are no
    files)."""
    files = [str(path) for path in sorted((root / "dev").glob("nvidia[0-9]*"))]
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if files or program is None:
        return files
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU ")]


def _cause(environ: Mapping[str, str], root: Path) -> str:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; `make install` installs one with it"
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it; unset CUDA_VISIBLE_DEVICES"
    if locked := _locked(root):
        return f"{locked}; in a Slurm job ask for it with --gres=gpu:N"
    try:
        torch.cuda.init()
        reason = "torch finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    try:
        version = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
        driver = f"driver {version.split('Module', 1)[-1].split()[0]}"
    except (OSError, IndexError):
        driver = "driver unknown"
    text = f"{reason} ({driver}, torch {torch.__version__} built for CUDA {torch.version.cuda}"
    text += f", CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ")"
    return f"{text}; see nvidia-smi, CUDA 13 needs driver 580 or newer"


def _locked(root: Path) -> str | None:
    """Why the device files cannot be opened (a job's control group can forbid it); None where one can be."""
    reasons = []
    for path in sorted((root / "dev").glob("nvidia[0-9]*")):
        try:
            os.close(os.open(path, os.O_RDWR))
            return None
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
    return reasons[0] if reasons else None


def use_expandable_segments(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have torch's allocator grow its segments of GPU memory, unless the user has settings of their own.

    Activations of a training differ in size from layer to layer; in segments of fixed size gigabytes of
    free memory can lie in pieces too small for the next one. Call it before the first GPU tensor.
    """
    if not any(environ.get(name) for name in ALLOCATOR):
        environ[ALLOCATOR[0]] = "expandable_segments:True"


def check_gpu(device: torch.device) -> None:
    """Add two numbers on ``device``.

    Raises:
        UserError: torch sees the GPU, but its kernels do not run there (another architecture, a GPU that
            another process has to itself, a broken driver).
    """
    try:
        works = (torch.ones(2, device=device) + 1).sum().item() == 4
        reason = "it computes 1 + 1 wrongly"
    except RuntimeError as error:
        works, reason = False, first_line(error)
    if not works:
        raise UserError(
            f"torch {torch.__version__} sees {device}, but cannot compute on it: {reason}; see nvidia-smi, "
            "or give --device cpu"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
