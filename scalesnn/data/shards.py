"""Images inside large files: WebDataset's tar shards, TFRecord and RecordIO.

Only the index differs from a folder of images: it says in which shard, at which byte and how long each image
is. Shards are read at random places, so order, augmentation, evaluation and resume are those of a folder. An
index is made by walking the shards' headers, without reading the images.

Labels. A tar member KEY.cls holds the label of KEY.jpg as a number, or KEY.json has it as "label"; in a
TFRecord it is the feature image/class/label; in a RecordIO record it stands in the header. ``classes.txt``
beside the splits names the classes, one a line; without it, classes are the different labels in sorted order.
"""

from __future__ import annotations

import json
import logging
import mmap
import re
import struct
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalesnn.base import UserError
from scalesnn.data.index import IMAGE_EXTENSIONS, ImageIndex

__all__ = ["CLASSES_FILE", "find_shards", "index_shards"]

CLASSES_FILE = "classes.txt"
_TFRECORD_NAME = re.compile(r".*\.tfrecords?(-.*)?|.*-\d+-of-\d+")
_IMAGE_FEATURES = ("image/encoded", "image", "image_raw")
_LABEL_FEATURES = ("image/class/label", "label")
_RECORDIO_MAGIC = 0xCED7230A

log = logging.getLogger("scalesnn.data")


class _Entry(NamedTuple):
    """One image of a shard."""

    name: str
    offset: int
    length: int
    label: int


def find_shards(folder: Path) -> tuple[str, list[Path]] | None:
    """The format ("tar", "tfrecord" or "recordio") and shards of a split's folder; None where it has no
    shards."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    groups = {
        "tar": [file for file in files if file.suffix == ".tar"],
        "recordio": [file for file in files if file.suffix == ".rec"],
        "tfrecord": [file for file in files if file.suffix != ".idx" and _TFRECORD_NAME.fullmatch(file.name)],
    }
    for kind, shards in groups.items():
        if shards:
            return kind, shards
    return None


def index_shards(root: Path, kind: str, shards: list[Path], classes: list[str] | None = None) -> ImageIndex:
    """Walk the shards of one split.

    Args:
        root: the split's folder.
        kind, shards: as find_shards gave them.
        classes: the classes of the training split, where this is the validation split.

    Raises:
        UserError: a shard that is damaged or has no images, or labels that do not fit the classes.
    """
    walk = {"tar": _walk_tar, "tfrecord": _walk_tfrecord, "recordio": _walk_recordio}[kind]
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        lists = list(pool.map(lambda shard: _listed(walk, shard), shards))
    labels = np.array([entry.label for entries in lists for entry in entries], np.int64)
    if not len(labels):
        raise UserError(f"no image in the {kind} shards of {root}")
    names, labels = _classes(root, labels, classes)
    counts = [len(entries) for entries in lists]
    return ImageIndex(
        names,
        labels,
        [shard.name for shard in shards],
        root,
        names=[entry.name for entries in lists for entry in entries],
        shard=np.repeat(np.arange(len(shards)), counts),
        offset=np.array([entry.offset for entries in lists for entry in entries], np.int64),
        length=np.array([entry.length for entries in lists for entry in entries], np.int64),
    )


def _classes(root: Path, labels: np.ndarray, classes: list[str] | None) -> tuple[list[str], np.ndarray]:
    """Class names, and labels as places in them."""
    listed = root.parent / CLASSES_FILE
    if listed.is_file():
        names = [line for line in listed.read_text(encoding="utf-8").splitlines() if line]
        if labels.min() < 0 or labels.max() >= len(names):
            raise UserError(
                f"{root}: labels run from {labels.min()} to {labels.max()}, "
                f"but {listed} has {len(names)} lines"
            )
        return names, labels
    if classes is None:
        different, places = np.unique(labels, return_inverse=True)
        return [str(label) for label in different.tolist()], places.astype(np.int64)
    place = {name: number for number, name in enumerate(classes)}
    unknown = sorted({label for label in labels.tolist() if str(label) not in place})
    if unknown:
        raise UserError(f"{root}: label {unknown[0]} is not among the training labels")
    return classes, np.array([place[str(label)] for label in labels.tolist()], np.int64)


def _listed(walk: object, shard: Path) -> list[_Entry]:
    """All entries of a shard, or UserError where it is damaged."""
    assert callable(walk)
    try:
        return list(walk(shard))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, IndexError, struct.error, tarfile.TarError) as error:
        raise UserError(f"{shard} is damaged: {error}") from error


def _walk_tar(shard: Path) -> Iterator[_Entry]:
    """KEY.jpg (or another image) with KEY.cls or KEY.json; members of a key follow each other."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            end = member.offset_data + (member.size + 511) // 512 * 512
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key, extension = f"{folder}/{stem}", f".{extension.lower()}"
            if extension in IMAGE_EXTENSIONS:
                images[key] = (member.name, member.offset_data, member.size)
            elif extension in (".cls", ".json"):
                file = tar.extractfile(member)
                assert file is not None
                text = file.read()
                labels[key] = int(text) if extension == ".cls" else int(json.loads(text)["label"])
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    with open(shard, "rb") as file:  # tarfile takes a cut for the end
        file.seek(end)
        if file.read(512) != bytes(512):
            raise ValueError("it is cut off")
    for key, (name, offset, length) in images.items():
        if key not in labels:
            raise UserError(f"{shard}: {name} has no label: expected {key.lstrip('/')}.cls beside it")
        yield _Entry(name, offset, length, labels[key])


def _records(shard: Path, data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Offset and length of each record of a TFRecord file, from its index file where there is one."""
    for index in (
        shard.with_name(shard.name + ".idx"),
        shard.with_suffix(".idx"),
        shard.parent / f"idx_files/{shard.name}.idx",
    ):
        if index.is_file():
            for line in index.read_text().splitlines():
                start, length = (int(word) for word in line.split())
                yield start + 12, length - 16
            return
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + length + 16 > len(data):
            raise ValueError("its last record is cut off")
        yield at + 12, length
        at += length + 16


def _walk_tfrecord(shard: Path) -> Iterator[_Entry]:
    """Records that hold a tf.train.Example; checksums are not looked at."""
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, (start, length) in enumerate(_records(shard, data)):
            if start + length > len(data):
                raise ValueError("its last record is cut off")
            image: tuple[int, int] | None = None
            label: int | None = None
            for key, place, end in _features(data, start, start + length):
                if key in _IMAGE_FEATURES:
                    image = _first_bytes(data, place, end)
                elif key in _LABEL_FEATURES:
                    label = _first_integer(data, place, end)
            if image is None or label is None:
                raise ValueError(f"record {number} has no image/encoded or no image/class/label")
            yield _Entry(f"{number}", image[0], image[1] - image[0], label)


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A protocol buffer's variable-length integer, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, start and end of each field of a message; a varint's start is its value."""
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, wire, value, value
        elif wire == 2:
            length, at = _varint(data, at)
            yield number, wire, at, at + length
            at += length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError("not a tf.train.Example")


def _features(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of each feature of an Example: Example.features (1) holds a map (1) of key (1),
    value (2)."""
    for number, _, features, features_end in _fields(data, at, end):
        if number != 1:
            continue
        for _, _, entry, entry_end in _fields(data, features, features_end):
            key, value = "", (0, 0)
            for part, _, start, stop in _fields(data, entry, entry_end):
                if part == 1:
                    key = data[start:stop].decode()
                else:
                    value = (start, stop)
            yield key, *value


def _first_bytes(data: mmap.mmap, at: int, end: int) -> tuple[int, int] | None:
    """Start and end of a feature's first bytes: Feature.bytes_list (1), its value (1)."""
    for number, _, start, stop in _fields(data, at, end):
        if number == 1:
            for _, _, first, last in _fields(data, start, stop):
                return first, last
    return None


def _first_integer(data: mmap.mmap, at: int, end: int) -> int | None:
    """A feature's first integer: Feature.int64_list (3), its value (1), packed or not."""
    for number, _, start, stop in _fields(data, at, end):
        if number == 3:
            for _, wire, first, _ in _fields(data, start, stop):
                return _varint(data, first)[0] if wire == 2 else first
    return None


def _walk_recordio(shard: Path) -> Iterator[_Entry]:
    """MXNet's image records: magic, length, then flag, label, two identifiers (and ``flag`` more labels), the
    image."""
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = number = 0
        while at < len(data):
            magic, word = struct.unpack_from("<II", data, at)
            if magic != _RECORDIO_MAGIC:
                raise ValueError(f"no record at byte {at}")
            part, length = word >> 29, word & (1 << 29) - 1
            if at + 8 + length > len(data):
                raise ValueError("its last record is cut off")
            if part:  # its bytes happen to hold the magic word: one in some 100,000 images
                log.warning("%s: record %d is stored in parts and is left out", shard, number)
                number += part == 3  # the last part
                at += 8 + (length + 3) // 4 * 4
                continue
            flag, label = struct.unpack_from("<If", data, at + 8)
            if flag > 0:
                (label,) = struct.unpack_from("<f", data, at + 32)
            header = 24 + 4 * flag
            if label == int(label) and length > header:
                yield _Entry(f"{number}", at + 8 + header, length - header, int(label))
            number += 1
            at += 8 + (length + 3) // 4 * 4
