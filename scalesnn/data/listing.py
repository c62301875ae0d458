"""The index of a split in whatever format it is, from a stored list where that is still right; and bad
images' lists."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zipfile
from pathlib import Path

import numpy as np

from scalesnn.base import UserError
from scalesnn.data.index import IMAGE_EXTENSIONS, ImageIndex, class_folders, index_folder
from scalesnn.data.parquet import ParquetIndex, index_parquet, parquet_files
from scalesnn.data.shards import compressed_shards, find_shards, index_shards, looks_like_shard
from scalesnn.data.walking import is_hidden, state_of

__all__ = [
    "BAD_LIST",
    "STORED_INDEX",
    "bad_list_name",
    "holds_frames",
    "is_frames",
    "make_index",
    "open_index",
    "read_bad_list",
    "shards_of",
    "store_index",
    "stored_beside",
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
    if not root.is_dir():
        files = parquet_files(root)
        return index_parquet(root, files, classes) if files else index_folder(root, classes)
    found = find_shards(root)
    folders = class_folders(root)
    if found is not None and not _prefer_folders(root, *found, [entry.name for entry in folders]):
        kind, shards = found
        if kind == "parquet":
            return index_parquet(root, shards, classes)
        return index_shards(root, kind, shards, classes)
    if not folders and (compressed := compressed_shards(root)):
        raise UserError(
            f"{compressed[0]} is compressed, and images are read from the middle of shards: uncompress it"
        )
    return index_folder(root, classes, FRAME_EXTENSIONS if holds_frames(root) else IMAGE_EXTENSIONS)


def _prefer_folders(root: Path, kind: str, shards: list[Path], folders: list[str]) -> bool:
    """Whether class folders hold the data, and the shards beside them are each class's archive or are shards
    by name only.

    Raises:
        UserError: both may be the data.
    """
    extensions = IMAGE_EXTENSIONS + FRAME_EXTENSIONS
    holding = [name for name in folders if _holds(root / name, extensions)]
    if not holding:
        return False
    real = [shard for shard in shards if shard.stem not in folders and looks_like_shard(kind, shard)]
    if real:
        raise UserError(
            f"{root} holds both class folders with images (such as {holding[0]}) and {kind} shards "
            f"(such as {real[0].name}): move away what is not to be trained on"
        )
    return True


def _holds(folder: Path, extensions: tuple[str, ...]) -> bool:
    """Whether there is a file with one of ``extensions`` below ``folder``."""
    return any(
        name.lower().endswith(extensions) and not is_hidden(name)
        for _, _, names in os.walk(folder)
        for name in names
    )


def shards_of(root: Path) -> list[Path]:
    """The shards or parquet files that ``make_index(root)`` would look at; none for class folders."""
    if not root.is_dir():
        return parquet_files(root)
    found = find_shards(root)
    folders = [entry.name for entry in class_folders(root)]
    return [] if found is None or _prefer_folders(root, *found, folders) else found[1]


def holds_frames(root: Path) -> bool:
    """Whether the class folders of ``root`` hold arrays of event frames."""
    extensions = (_first_extension(entry.path) for entry in class_folders(root)) if root.is_dir() else ()
    return next((extension for extension in extensions if extension), "") in FRAME_EXTENSIONS


def _first_extension(folder: str) -> str:
    with os.scandir(folder) as entries:
        names = (entry.name.lower() for entry in entries if not is_hidden(entry.name))
        extensions = (os.path.splitext(name)[1] for name in names)
        known = (extension for extension in extensions if extension in IMAGE_EXTENSIONS + FRAME_EXTENSIONS)
        return next(known, "")


def _top(root: Path) -> list[str]:
    """The names in ``root`` that a listing looks at; the stored list itself is none of them."""
    return sorted(entry for entry in os.listdir(root) if not entry.startswith(STORED_INDEX[:-4]))


def _stamp(root: Path, sources: dict[str, str]) -> str:
    """What a list depends on, as text: the names in ``root``; every folder and shard, with its time stamp and
    size; and what this version takes for an image."""
    return json.dumps([2, IMAGE_EXTENSIONS, FRAME_EXTENSIONS, _top(root), sources])


def _fits(root: Path, stamp: str) -> bool:
    """Whether ``root`` is as it was when the list with ``stamp`` was made."""
    sources = json.loads(stamp)[4]
    return stamp == _stamp(root, {name: state_of(os.path.join(root, name)) for name in sources})


def _as_bytes(names: list[str]) -> np.ndarray:
    """Names as one array of bytes, zero bytes between them: a file name may hold anything else."""
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def _as_list(stored: np.ndarray) -> list[str]:
    return stored.tobytes().decode("utf-8", "surrogateescape").split("\0")


def stored_beside(root: Path) -> Path:
    """Where `scalesnn data index` stores the list of a split: in its folder, or beside its parquet files."""
    return root / STORED_INDEX if root.is_dir() else root.parent / f"{STORED_INDEX[:-4]}-{root.name}.npz"


def store_index(index: ImageIndex, target: Path) -> None:
    """Write ``index`` to ``target``, a .npz file that open_index reads; the file appears whole or not at
    all."""
    arrays: dict[str, np.ndarray] = {
        "stamp": _as_bytes([_stamp(index.root, index.sources)]),
        "classes": _as_bytes(index.classes),
        "files": _as_bytes(index.files),
        "labels": index.labels,
        "left_out": _as_bytes(index.left_out),
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
            if not _fits(root, _as_list(stored["stamp"])[0]):
                return None
            in_shards = "shard" in stored
            files = _as_list(stored["files"])
            kind = ParquetIndex if in_shards and files[0].endswith(".parquet") else ImageIndex
            index = kind(
                _as_list(stored["classes"]),
                stored["labels"],
                files,
                root,
                names=_as_list(stored["names"]) if in_shards else None,
                shard=stored["shard"] if in_shards else None,
                offset=stored["offset"] if in_shards else None,
                length=stored["length"] if in_shards else None,
                left_out=[line for line in _as_list(stored["left_out"]) if line],
            )
            return index if len(index.names) == len(index) else None
    except (OSError, LookupError, TypeError, ValueError, EOFError, zipfile.BadZipFile):
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
    folder = root if root.is_dir() else root.parent
    if folder.is_dir():
        for source in (stored_beside(root), kept):
            index = _stored(folder, source) if source is not None else None
            if index is not None and classes in (None, index.classes):
                return index
    index = make_index(root, classes)
    if kept is not None:
        store_index(index, kept)
    return index


def bad_list_name(name: str) -> str:
    """``name`` as it stands in a list of bad images: as a JSON string where a line could not hold it."""
    plain = name == name.strip() and not name.startswith(("#", '"')) and not set(name) & set("\t\n\r")
    return name if plain else json.dumps(name)


def _listed_name(entry: str) -> str:
    if entry.startswith('"') and entry.endswith('"'):
        try:
            return str(json.loads(entry))
        except ValueError:  # a list by hand, and a name with quotes
            pass
    return entry


def read_bad_list(path: Path, root: Path) -> set[str]:
    """The images that a list of `scalesnn data check` names, as full paths: one a line, up to a tab; # begins
    a comment; a name in double quotes is a JSON string.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"--bad-image-list {path}: {error.strerror}") from error
    entries = (line.removesuffix("\r").split("\t")[0] for line in text.split("\n"))
    return {
        str(root / _listed_name(entry)) for entry in entries if entry.strip() and not entry.startswith("#")
    }
