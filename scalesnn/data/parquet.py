"""Parquet files as Hugging Face's data sets have them: one row an image, read at random places.

A split is a folder of .parquet files, or the files DIR/train-00000-of-00294.parquet beside each other; then
its path is DIR/train, which need not exist. The image is a column of bytes, or a struct with a field "bytes";
the label is a whole number, whose names stand in the schema. A column must be the only one of its kind, or be
called "image" or "label".

Parquet is compressed in row groups (Hugging Face writes 100 images in one), and reading an image reads its
group. Each thread keeps the last group that it read, so neighbours, as in an evaluation, cost nothing more.
"""

from __future__ import annotations

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalesnn.base import UserError
from scalesnn.data.index import ImageIndex
from scalesnn.data.labels import class_number
from scalesnn.data.shards import CLASSES_FILE, beside_shards, place_labels
from scalesnn.data.walking import is_hidden, state_of

__all__ = ["ParquetIndex", "index_parquet", "parquet_files"]

_LARGE_GROUP = 128 * 2**20


def parquet_files(split: Path) -> list[Path]:
    """The parquet files of a split, sorted: those in the folder ``split``, or those beside it whose names
    begin with its name, such as train-00000-of-00294.parquet."""
    if split.is_dir():
        wanted = re.compile(r".*\.parquet")
        folder = split
    else:
        wanted, folder = re.compile(re.escape(split.name) + r"([-_.].*)?\.parquet"), split.parent
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if wanted.fullmatch(file.name) and not is_hidden(file.name) and file.is_file()
    )


def _pyarrow() -> Any:
    """The library, imported at the first call; the parent process's threads are not used.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"reading parquet files needs pyarrow ({error}): pip install pyarrow, or 'scalesnn[parquet]'"
        ) from error
    return pyarrow


class ParquetIndex(ImageIndex):
    """Images in parquet files: ``offset`` is the row group of each, ``length`` its row in there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin()

    def _begin(self) -> None:
        self._opened: dict[int, tuple[Any, str]] = {}  # of each file: metadata and the image column
        self._last = threading.local()

    def read(self, image: int) -> bytes:
        """The bytes of image ``image``. Threads may call this at the same time.

        Raises:
            OSError: the file cannot be read or is damaged there, or the row has no bytes.
        """
        assert self.shard is not None
        assert self.offset is not None
        assert self.length is not None
        place = int(self.shard[image]), int(self.offset[image])
        try:
            if getattr(self._last, "place", None) != place:
                self._last.place = None
                self._last.images = self._read_group(*place)
                self._last.place = place
            value = self._last.images[int(self.length[image])].as_py()
        except (OSError, ValueError, LookupError, RuntimeError, TypeError) as error:  # pyarrow's are of these
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise OSError(f"damaged parquet: {str(error).splitlines()[0]}") from error
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise OSError("the row has no bytes")
        return data

    def _read_group(self, shard: int, group: int) -> Any:
        """The image column of a row group; one thread reads, as loaders have threads of their own."""
        parquet = _pyarrow().parquet
        path = self.root / self.files[shard]
        if shard not in self._opened:
            with parquet.ParquetFile(path) as file:
                self._opened[shard] = file.metadata, _columns(file.schema_arrow, path.name).image
        metadata, column = self._opened[shard]
        with parquet.ParquetFile(path, metadata=metadata, pre_buffer=False) as file:
            return file.read_row_group(group, columns=[column], use_threads=False).column(0)

    def close(self) -> None:
        """Give back what reading keeps; the index may be used again."""
        super().close()
        self._begin()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_opened": {}, "_last": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._begin()


class _Columns(NamedTuple):
    """The columns of a file that count; ``image`` is a path such as image.bytes."""

    image: str
    label: str
    classes: list[str] | None


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's datasets library says of the columns, {} where it did not write the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _columns(schema: Any, name: str) -> _Columns:
    """Find the image and its label.

    Raises:
        UserError: there is none, or several that may be meant.
    """
    types = _pyarrow().types
    images, labels = {}, []
    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            images[field.name] = f"{field.name}.bytes"
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            images[field.name] = field.name
        elif types.is_integer(field.type):
            labels.append(field.name)
    features = _features(schema)
    kinds = {key: value.get("_type") for key, value in features.items() if isinstance(value, dict)}
    image = _only([n for n in images if kinds.get(n) == "Image"] or list(images), "image", name, "bytes")
    label = _only(
        [n for n in labels if kinds.get(n) == "ClassLabel"] or labels, "label", name, "whole numbers"
    )
    names = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
    return _Columns(images[image], label, [str(n) for n in names] if isinstance(names, list) else None)


def _only(found: list[str], wanted: str, file: str, kind: str) -> str:
    """``wanted`` where it is among the columns, or the only one of them."""
    if wanted in found:
        return wanted
    if len(found) != 1:
        have = f"the columns {', '.join(found)}" if found else "none"
        raise UserError(f"{file}: expected one column of {kind}, or one called {wanted!r}; found {have}")
    return found[0]


class _File(NamedTuple):
    """What the index needs to know of a file."""

    groups: list[int]  # rows
    labels: np.ndarray
    classes: list[str] | None
    largest_group: int  # bytes


def _look(path: Path) -> _File:
    """Read a file's labels and row groups, not its images.

    Raises:
        UserError: a damaged file, no such columns, or a label that is missing or no class.
    """
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, str(path))
            column = file.read(columns=[columns.label], use_threads=False).column(0)
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise UserError(f"{path}#{row}: no label")
    labels = column.to_numpy()
    for row in np.flatnonzero(labels < 0)[:1].tolist():
        class_number(int(labels[row]), f"{path}#{row}")
    largest = max((group.total_byte_size for group in groups), default=0)
    return _File([group.num_rows for group in groups], labels.astype(np.int64), columns.classes, largest)


def index_parquet(split: Path, files: list[Path], classes: list[str] | None = None) -> ParquetIndex:
    """List the images of one split.

    Args:
        split: the split's path, see ``parquet_files``.
        files: its files.
        classes: the classes of the training split, where this is the validation split.

    Raises:
        UserError: a file that is damaged or has no such columns, or labels that do not fit the classes.
    """
    root = files[0].parent
    sources = {
        os.path.relpath(path, root): state_of(str(path), settle=True)
        for path in (split.parent / CLASSES_FILE, *files)
    }
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        looked = list(pool.map(_look, files))
    labels = np.concatenate([file.labels for file in looked])
    if not len(labels):
        raise UserError(f"no image in the parquet files {split}*")
    named = next((file.classes for file in looked if file.classes is not None), None)
    for file, path in zip(looked, files, strict=True):
        if file.classes != named:
            raise UserError(f"{path} names other classes than {files[0].name}")
    names, labels = place_labels(split, labels, classes, named)
    groups = [rows for file in looked for rows in file.groups]
    counts = [len(file.labels) for file in looked]
    remarks = beside_shards(split, set(sources)).lines(split) if split.is_dir() else []
    largest = max(file.largest_group for file in looked)
    if largest > _LARGE_GROUP:
        remarks.append(
            f"{split}: a row group has {largest // 2**20} MiB, and reading one image reads its group: "
            "`scalesnn data pack` writes shards that are quicker to read"
        )
    return ParquetIndex(
        names,
        labels,
        [file.name for file in files],
        root,
        names=[str(row) for count in counts for row in range(count)],
        shard=np.repeat(np.arange(len(files)), counts),
        offset=np.repeat(np.concatenate([np.arange(len(file.groups)) for file in looked]), groups),
        length=np.concatenate([np.arange(rows) for rows in groups]),
        left_out=remarks,
        sources=sources,
    )
