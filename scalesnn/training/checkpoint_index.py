"""What a checkpoint says of itself: index.json, with the tensors, the files and their checksums, and plain
values."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "DamagedCheckpointError",
    "Index",
    "from_plain",
    "sync_folder",
    "to_plain",
    "write_text_durably",
]

INDEX = "index.json"
FORMAT = "scalesnn checkpoint"
VERSION = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedCheckpointError(ValueError):
    """A checkpoint that is incomplete, changed since it was written, or no checkpoint of ours."""


# ---- plain values ----


def to_plain(value: Any) -> Any:
    """Turn schedules' states and the like into what JSON holds, so that ``from_plain`` gives the same back.

    Raises:
        TypeError: an object that is neither a number, text, a container of such, nor a small tensor.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return {"__tensor__": value.tolist(), "dtype": DTYPE_NAMES[value.dtype]}
    if isinstance(value, Counter):
        return {"__counter__": [[to_plain(k), v] for k, v in value.items()]}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return {k: to_plain(v) for k, v in value.items()}
        return {"__items__": [[to_plain(k), to_plain(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [to_plain(v) for v in value]}
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    raise TypeError(f"cannot store an object of type {type(value).__name__} in a checkpoint")


def from_plain(value: Any) -> Any:
    """The inverse of ``to_plain``."""
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return torch.tensor(value["__tensor__"], dtype=DTYPES[value["dtype"]])
    if "__counter__" in value:
        return Counter({from_plain(k): v for k, v in value["__counter__"]})
    if "__items__" in value:
        return {from_plain(k): from_plain(v) for k, v in value["__items__"]}
    if "__tuple__" in value:
        return tuple(from_plain(v) for v in value["__tuple__"])
    return {k: from_plain(v) for k, v in value.items()}


# ---- the index ----


@dataclass
class Index:
    """What index.json says.

    Attributes:
        tensors: by name: dtype, shape and entries, each (start, length, file).
        files: by name: length in bytes and SHA-256.
        plain: everything that is not a tensor.
    """

    tensors: dict[str, Any]
    files: dict[str, Any]
    plain: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write index.json into ``folder``, durably."""
        body = {"tensors": self.tensors, "files": self.files, "plain": to_plain(self.plain)}
        head = {"format": FORMAT, "version": VERSION, "sha256": checksum(body)}
        write_text_durably(folder / INDEX, json.dumps({**head, "body": body}))

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read index.json.

        Raises:
            DamagedCheckpointError: it is missing, unreadable, changed, or of another version.
        """
        try:
            document = json.loads((folder / INDEX).read_bytes())
        except FileNotFoundError:
            raise DamagedCheckpointError(f"it has no {INDEX}, so it is no checkpoint of scalesnn") from None
        except OSError as error:
            raise DamagedCheckpointError(f"{INDEX} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise DamagedCheckpointError(f"{INDEX} is not valid JSON") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise DamagedCheckpointError(f"{INDEX} is not of scalesnn")
        if document.get("version") != VERSION:
            raise DamagedCheckpointError(
                f"it has version {document.get('version')}, this scalesnn reads {VERSION}"
            )
        body = document.get("body")
        if not isinstance(body, dict) or document.get("sha256") != checksum(body):
            raise DamagedCheckpointError(f"{INDEX} does not match its checksum")
        try:
            index = cls(body["tensors"], body["files"], from_plain(body["plain"]))
            index.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DamagedCheckpointError):
                raise
            raise DamagedCheckpointError(f"{INDEX} is not complete ({error!r})") from None
        return index

    def check(self) -> None:
        """Raise DamagedCheckpointError unless files lie in the folder and entries make up whole tensors."""
        for name, known in self.files.items():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise DamagedCheckpointError(f"{INDEX} names the file {name!r}, which lies elsewhere")
            if not isinstance(known["bytes"], int) or not isinstance(known["sha256"], str):
                raise DamagedCheckpointError(f"{INDEX} says nothing of {name}'s length and checksum")
        for name, entry in self.tensors.items():
            numel, reached = torch.Size(entry["shape"]).numel(), 0
            for start, length, file in entry["entries"]:
                if start != reached or length < 1 or file not in self.files:
                    break
                reached += length
            if reached != numel or entry["dtype"] not in DTYPES:
                raise DamagedCheckpointError(f"{INDEX} does not hold all of {name}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of all tensors."""
        return {name: tuple(entry["shape"]) for name, entry in self.tensors.items()}

    def check_file(self, folder: Path, name: str) -> str | None:
        """What is wrong with one of the files, or None."""
        known = self.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != known["bytes"]:
                return f"{name} has {size} bytes instead of {known['bytes']}"
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if digest.hexdigest() == known["sha256"] else f"{name} does not match its checksum"


def checksum(body: Any) -> str:
    """SHA-256 of plain values, whatever the order of keys."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_text_durably(path: Path, text: str) -> None:
    """Write a file so that after a crash it is either as before or complete."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
