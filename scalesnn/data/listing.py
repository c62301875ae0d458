"""The index of a split in whatever format it is, from a stored list where that is still right; and bad
images' lists."""

from __future__ import annotations

import hashlib
import os
import uuid
import zipfile
from pathlib import Path

import numpy as np

from scalesnn.base import UserError
from scalesnn.data.index import IMAGE_EXTENSIONS, ImageIndex, class_folders, index_folder
from scalesnn.data.shards import CLASSES_FILE, find_shards, index_shards

__all__ = [
    "BAD_LIST",
    "STORED_INDEX",
    "holds_frames",
    "is_frames",
    "make_index",
    "open_index",
    "read_bad_list",
    "store_index",
]

BAD_LIST = "bad-images.txt"
STORED_INDEX = ".scalesnn-index.npz"
FRAME_EXTENSIONS = (".npy", ".npz")


def is_frames(index: ImageIndex) -> bool:
    """Whether the entries are arrays of event frames instead of images."""
    return index.shard is None and index.names[0].lower().endswith(FRAME_EXTENSIONS)


def make_index(root: Path, classes: list[str] | None = None) -> ImageIndex:
    """List one split: shards, class folders of .npy or .npz frames, or class folders of images.

    Raises:
        UserError: nothing there, or classes that do not fit; see index_folder and index_shards.
    """
    if root.is_dir():
        found = find_shards(root)
        if found is not None:
            return index_shards(root, *found, classes)
        if holds_frames(root):
            return index_folder(root, classes, FRAME_EXTENSIONS)
    return index_folder(root, classes, IMAGE_EXTENSIONS)


def holds_frames(root: Path) -> bool:
    """Whether the class folders of ``root`` hold arrays of event frames."""
    extensions = (_first_extension(entry.path) for entry in class_folders(root)) if root.is_dir() else ()
    return next((extension for extension in extensions if extension), "") in FRAME_EXTENSIONS


def _first_extension(folder: str) -> str:
    with os.scandir(folder) as entries:
        names = (entry.name.lower() for entry in entries)
        extensions = (os.path.splitext(name)[1] for name in names)
        known = (extension for extension in extensions if extension in IMAGE_EXTENSIONS + FRAME_EXTENSIONS)
        return next(known, "")


def _stamp(root: Path) -> str:
    """Changes when a file is added to or removed from a class folder, or when a shard changes its size."""
    digest = hashlib.sha256()
    found = find_shards(root)
    if found is not None:
        for shard in found[1]:
            digest.update(f"{shard.name} {shard.stat().st_size}\n".encode())
        listed = root.parent / CLASSES_FILE
        digest.update(listed.read_bytes() if listed.is_file() else b"")
    else:
        for entry in sorted(class_folders(root), key=lambda entry: entry.name):
            digest.update(f"{entry.name} {entry.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _as_bytes(names: list[str]) -> np.ndarray:
    """Names as one array of bytes, zero bytes between them: a file name may hold anything else."""
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def _as_list(stored: np.ndarray) -> list[str]:
    return stored.tobytes().decode("utf-8", "surrogateescape").split("\0")


def store_index(index: ImageIndex, target: Path) -> None:
    """Write ``index`` to ``target``, a .npz file that open_index reads; the file appears whole or not at
    all."""
    arrays: dict[str, np.ndarray] = {
        "stamp": np.array(_stamp(index.root)),
        "classes": _as_bytes(index.classes),
        "files": _as_bytes(index.files),
        "labels": index.labels,
    }
    if index.shard is not None and index.offset is not None and index.length is not None:
        arrays |= {"shard": index.shard, "offset": index.offset, "length": index.length}
        arrays["names"] = _as_bytes(index.names)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(target)


def _stored(root: Path, source: Path) -> ImageIndex | None:
    """The index in ``source``; None where there is none, or where it is not about ``root`` as it is now."""
    try:
        with np.load(source, allow_pickle=False) as stored:
            if str(stored["stamp"]) != _stamp(root):
                return None
            classes, files = _as_list(stored["classes"]), _as_list(stored["files"])
            if "shard" not in stored:
                return ImageIndex(classes, stored["labels"], files, root)
            return ImageIndex(
                classes,
                stored["labels"],
                files,
                root,
                names=_as_list(stored["names"]),
                shard=stored["shard"],
                offset=stored["offset"],
                length=stored["length"],
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def open_index(root: Path, classes: list[str] | None = None, cache: Path | None = None) -> ImageIndex:
    """The index of one split: as `scalesnn data index` stored it, as an earlier run kept it, or made now.

    Args:
        root: the split's folder.
        classes: the classes of the training split, where this is the validation split.
        cache: the folder where runs keep indexes (--cache-dataset); None: they do not.

    Raises:
        UserError: see make_index.
    """
    kept = (
        cache / f"{root.name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.npz"
        if cache
        else None
    )
    if root.is_dir():
        for source in (root / STORED_INDEX, kept):
            index = _stored(root, source) if source is not None else None
            if index is not None and classes in (None, index.classes):
                return index
    index = make_index(root, classes)
    if kept is not None:
        store_index(index, kept)
    return index


def read_bad_list(path: Path, root: Path) -> set[str]:
    """The images that a list of `scalesnn data check` names, as full paths: one a line, up to a tab; # begins
    a comment.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"--bad-image-list {path}: {error.strerror}") from error
    return {str(root / line.split("\t")[0]) for line in lines if line.strip() and not line.startswith("#")}
