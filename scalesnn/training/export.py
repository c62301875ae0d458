"""One file of whole weights, under torchvision's keys, from a checkpoint of any strategy."""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalesnn.base import UserError
from scalesnn.training.checkpoint import find_checkpoints
from scalesnn.training.checkpoint_index import DTYPES, DamagedCheckpointError, Index

__all__ = ["export", "read_weights", "write_whole"]

Result = TypeVar("Result")


def export(
    checkpoint: Path | str, output: Path | str, *, kind: str | None = None, ema: bool = False
) -> tuple[Path, int]:
    """Write whole weights to one file, and with them the class names and the settings of the training: as
    JSON in the safetensors metadata "classes" and "settings", or in a .pt file's ``_metadata``.

    Args:
        checkpoint: a checkpoint's folder, a run's, or a pointer file.
        output: the file; it is replaced only when the new one is complete.
        kind: ``safetensors`` or ``pt`` (torch.save of a state dict); None: by the file's suffix.
        ema: the averaged weights instead.

    Returns:
        the checkpoint's folder, and the number of tensors written.

    Raises:
        UserError: there is no such checkpoint, it is damaged, holds no average, or the file cannot be
            written.
    """
    output = Path(output).expanduser()
    if kind is None:
        kind = "pt" if output.suffix in (".pt", ".pth") else "safetensors"
    folder = find_checkpoints(Path(checkpoint))[0]
    weights = read_weights(folder, ema=ema)
    plain = Index.read(folder).plain
    about = {
        "classes": json.dumps((plain.get("data") or {}).get("classes", [])),
        "settings": json.dumps((plain.get("extra") or {}).get("settings") or {}),
    }

    def write(file: Path) -> None:
        if kind == "pt":
            state = OrderedDict(weights)
            setattr(state, "_metadata", {"": {"version": 1}, **about})  # noqa: B010  # as torch's
            torch.save(state, file)
        else:
            save_file(weights, file, metadata={"format": "pt", **about})

    write_whole(output, write, (OSError, RuntimeError))
    return folder, len(weights)


def write_whole(
    output: Path, write: Callable[[Path], Result], failures: tuple[type[Exception], ...] = (OSError,)
) -> Result:
    """Let ``write`` make the file of --output, which has its name only when it is complete.

    Args:
        failures: what ``write`` raises where it cannot write.

    Returns:
        what ``write`` returned.

    Raises:
        UserError: the file cannot be written.
    """
    beside = output.with_name(f".{output.stem}.tmp{output.suffix}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        result = write(beside)
        os.replace(beside, output)
    except failures as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {output}: cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):  # there is none, or the parent is no folder
            beside.unlink()
    return result


def read_weights(folder: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Whole weights and buffers of a checkpoint, every byte of it checked.

    Raises:
        UserError: it is missing or damaged, or ``ema`` is wanted and it holds none.
    """
    try:
        if not folder.is_dir():
            raise DamagedCheckpointError("there is no such folder")
        index = Index.read(folder)
        problem = next((p for p in (index.check_file(folder, name) for name in index.files) if p), None)
        if problem:
            raise DamagedCheckpointError(problem)
        prefix = "ema." if ema else "model."
        names = [name for name in index.tensors if name.startswith(prefix)]
    except DamagedCheckpointError as error:
        raise UserError(f"checkpoint {folder} cannot be used: {error}") from None
    if not names:
        raise UserError(f"checkpoint {folder} holds no averaged weights: its run had no --model-ema")
    files = {name: safe_open(str(folder / name), framework="pt") for name in index.files}
    weights: dict[str, Tensor] = {}
    for name in names:
        entry = index.tensors[name]
        shape = torch.Size(entry["shape"])
        flat = torch.empty(shape.numel(), dtype=DTYPES[entry["dtype"]])
        for start, length, file in entry["entries"]:
            flat[start : start + length] = files[file].get_tensor(f"{name}@{start}")
        weights[name.removeprefix(prefix)] = flat.view(shape)
    return weights
