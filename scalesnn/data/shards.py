"""Images inside large files: WebDataset's tar shards, TFRecord and RecordIO.

Only the index differs from a folder of images: it says in which shard, at which byte and how long each image
is. Shards are read at random places, so order, augmentation, evaluation and resume are those of a folder. An
index is made by walking the shards' headers, without reading the images.

Labels. A tar member KEY.cls holds the label of KEY.jpg as a number, or KEY.json has it as "label"; in a
TFRecord it is the feature image/class/label; in a RecordIO record it stands in the header. ``classes.txt``
beside the splits names the classes, one a line; without it, classes are the different labels in sorted order.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scalesnn.base import UserError
from scalesnn.data.index import ImageIndex
from scalesnn.data.labels import class_number
from scalesnn.data.tars import Entry, walk_tar
from scalesnn.data.walking import HIDDEN, LeftOut, is_folder, is_hidden, state_of

__all__ = [
    "CLASSES_FILE",
    "beside_shards",
    "compressed_shards",
    "find_shards",
    "index_shards",
    "looks_like_shard",
    "place_labels",
    "read_classes",
    "text_of_classes",
]

CLASSES_FILE = "classes.txt"
_TFRECORD_NAME = re.compile(r".*\.tfrecords?(-.*)?|.*-\d+-of-\d+")
_IMAGE_FEATURES = ("image/encoded", "image", "image_raw")
_LABEL_FEATURES = ("image/class/label", "label")
_RECORDIO_MAGIC = 0xCED7230A
_COMPRESSED_NAME = re.compile(r".*\.(tgz|tbz2?|txz|(tar|tfrecords?|rec)\.(gz|bz2|xz|zst|lz4))")
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


def find_shards(folder: Path) -> tuple[str, list[Path]] | None:
    """The format ("tar", "tfrecord", "recordio" or "parquet") and shards of a split's folder; None where it
    has no shards."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not is_hidden(file.name))
    groups = {
        "tar": [file for file in files if file.suffix == ".tar"],
        "recordio": [file for file in files if file.suffix == ".rec"],
        "parquet": [file for file in files if file.suffix == ".parquet"],
        "tfrecord": [file for file in files if file.suffix != ".idx" and _TFRECORD_NAME.fullmatch(file.name)],
    }
    for kind, shards in groups.items():
        if shards:
            return kind, shards
    return None


def compressed_shards(folder: Path) -> list[Path]:
    """Files whose names say that they are compressed shards."""
    return sorted(file for file in folder.iterdir() if _COMPRESSED_NAME.fullmatch(file.name.lower()))


def compression_of(shard: Path) -> str | None:
    """The format of a compressed file, from its first bytes."""
    with open(shard, "rb") as file:
        first = file.read(8)
    return next((name for magic, name in _COMPRESSIONS.items() if first.startswith(magic)), None)


def looks_like_shard(kind: str, shard: Path) -> bool:
    """Whether a file begins as a shard of this kind does."""
    if kind == "tar":
        return tarfile.is_tarfile(shard)
    with open(shard, "rb") as file:
        first = file.read(8)
    if kind == "parquet":
        return first.startswith(b"PAR1")
    if kind == "recordio":
        return first.startswith(struct.pack("<I", _RECORDIO_MAGIC))
    return len(first) == 8 and int.from_bytes(first, "little") + 16 <= shard.stat().st_size


def index_shards(root: Path, kind: str, shards: list[Path], classes: list[str] | None = None) -> ImageIndex:
    """Walk the shards of one split.

    Args:
        root: the split's folder.
        kind, shards: as find_shards gave them.
        classes: the classes of the training split, where this is the validation split.

    Raises:
        UserError: a shard that is damaged or has no images, or labels that do not fit the classes.
    """
    walk: _Walk = {"tar": walk_tar, "tfrecord": _walk_tfrecord, "recordio": _walk_recordio}[kind]
    indexes = (index for shard in shards if kind == "tfrecord" for index in _idx_files(shard))
    sources = {
        os.path.relpath(path, root): state_of(str(path), settle=True)
        for path in (root.parent / CLASSES_FILE, *shards, *indexes)
    }
    left_out = beside_shards(root, {shard.name for shard in shards})
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        walked = list(pool.map(lambda shard: _listed(walk, shard), shards))
    for _, more in walked:
        left_out.merge(more)
    remarks = left_out.lines(root)
    lists = [entries for entries, _ in walked]
    labels = np.array([entry.label for entries in lists for entry in entries], np.int64)
    if not len(labels):
        raise UserError("; ".join([f"no image in the {kind} shards of {root}", *remarks]))
    names, labels = place_labels(root, labels, classes)
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
        left_out=remarks,
        sources=sources,
    )


def beside_shards(root: Path, shards: set[str]) -> LeftOut:
    """What lies beside the shards of a split and is neither one of them nor an index of them."""
    found = LeftOut()
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name in shards or entry.name == "idx_files" or entry.name.endswith(".idx"):
                continue
            if is_folder(entry):
                found.add(HIDDEN if is_hidden(entry.name) else "folders beside the shards", entry.name)
            elif not is_hidden(entry.name):
                found.add("other files beside the shards", entry.name)
    return found


def read_classes(path: Path) -> list[str]:
    """The class names in a classes.txt, one a line; a name need not be UTF-8.

    Raises:
        UserError: no text, or an empty line between the others, which would shift the labels.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return _classes_of(text, path)


def text_of_classes(names: list[str]) -> bytes:
    """What a classes.txt with these names holds.

    Raises:
        UserError: read again, a name would be another.
    """
    encoded = [name.encode("utf-8", "surrogateescape") + b"\n" for name in names]
    for name, line in zip(names, encoded, strict=True):
        try:
            held = _classes_of(line, Path(CLASSES_FILE)) == [name]
        except UserError:
            held = False
        if not held:
            raise UserError(f"{CLASSES_FILE} cannot hold the class name {name!r}: rename the class")
    return b"".join(encoded)


def _classes_of(text: bytes, path: Path) -> list[str]:
    if b"\0" in text:
        raise UserError(f"{path} is not a text file in UTF-8")
    names = text.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").rstrip("\r\n").split("\n")
    names = [name.removesuffix("\r") for name in names]
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty, but each line is the name of a class")
    return names


def place_labels(
    root: Path, labels: np.ndarray, classes: list[str] | None, named: list[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Class names, and labels as places in them.

    Args:
        root: the split's folder; classes.txt is looked for beside it.
        labels: the numbers that stand in the shards.
        classes: the classes of the training split, where this is the validation split.
        named: the classes that the shards name themselves.

    Raises:
        UserError: labels without a name, or other classes than the training split's.
    """
    listed = root.parent / CLASSES_FILE
    names = read_classes(listed) if listed.is_file() else named
    if names is not None:
        if labels.max() >= len(names):
            where = (
                f"{listed} has {len(names)} lines" if listed.is_file() else f"{len(names)} classes are named"
            )
            raise UserError(f"{root}: labels run from {labels.min()} to {labels.max()}, but {where}")
        if classes not in (None, names):
            raise UserError(f"{root} names other classes than the training images")
        return names, labels
    if classes is None:
        different, places = np.unique(labels, return_inverse=True)
        return [str(label) for label in different.tolist()], places.astype(np.int64)
    place = {name: number for number, name in enumerate(classes)}
    unknown = sorted({label for label in labels.tolist() if str(label) not in place})
    if unknown:
        raise UserError(f"{root}: label {unknown[0]} is not among the training labels")
    return classes, np.array([place[str(label)] for label in labels.tolist()], np.int64)


# What reading damaged bytes raises: a header may ask for any memory, and tarfile recurses over headers.
_DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, OverflowError, struct.error)
_DAMAGE += (tarfile.TarError, MemoryError, RecursionError)

_Walk = Callable[[Path, LeftOut], Iterator[Entry]]


def _listed(walk: _Walk, shard: Path) -> tuple[list[Entry], LeftOut]:
    """All entries of a shard and what it left out, or UserError where it is damaged."""
    left_out = LeftOut()
    try:
        return list(walk(shard, left_out)), left_out
    except UserError:
        raise
    except _DAMAGE as error:
        compression = compression_of(shard) if shard.is_file() else None
        if compression is not None:
            raise UserError(
                f"{shard} is compressed ({compression}), and images are read from the middle of shards: "
                "uncompress it"
            ) from None
        raise UserError(f"{shard} is damaged: {error}") from error


def _idx_files(shard: Path) -> list[Path]:
    """Where DALI's tools put the index of a TFRecord file."""
    inside = shard.parent / f"idx_files/{shard.name}.idx"
    return list(dict.fromkeys([shard.with_name(shard.name + ".idx"), shard.with_suffix(".idx"), inside]))


def _records(shard: Path, data: mmap.mmap, left_out: LeftOut) -> list[tuple[int, int]]:
    """Offset and length of each record of a TFRecord file, from its index file where there is a whole one."""
    for index in _idx_files(shard):
        if index.is_file():
            records = _indexed_records(index, len(data))
            if records is not None:
                return records
            left_out.add("index files that do not fit their shard", index.name)
    records, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + length + 16 > len(data):
            raise ValueError("its last record is cut off")
        records.append((at + 12, length))
        at += length + 16
    return records


def _indexed_records(index: Path, size: int) -> list[tuple[int, int]] | None:
    """The records that an index file names; None where they do not fill ``size`` bytes one after another."""
    records, at = [], 0
    try:
        for line in index.read_text(encoding="utf-8").splitlines():
            start, length = (int(word) for word in line.split())
            if start != at or length < 16:
                return None
            records.append((start + 12, length - 16))
            at += length
    except ValueError:
        return None
    return records if at == size else None


def _walk_tfrecord(shard: Path, left_out: LeftOut) -> Iterator[Entry]:
    """Records that hold a tf.train.Example; checksums are not looked at."""
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, (start, length) in enumerate(_records(shard, data, left_out)):
            image: tuple[int, int] | None = None
            label: int | None = None
            for key, place, end in _features(data, start, start + length):
                if key in _IMAGE_FEATURES:
                    image = _first_bytes(data, place, end)
                elif key in _LABEL_FEATURES:
                    label = _first_integer(data, place, end)
            if image is None or label is None:
                raise UserError(
                    f"{shard}: record {number} has no image/encoded or no whole number in image/class/label"
                )
            if label >= 1 << 63:  # stored as two's complement
                label -= 1 << 64
            label = class_number(label, f"{shard}: record {number}")
            yield Entry(f"{number}", image[0], image[1] - image[0], label)


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
        if shift == 70:
            raise ValueError("an integer of more than ten bytes")


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
            if at + length > end:
                raise ValueError("a field that reaches past its record")
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
            for _, wire, first, last in _fields(data, start, stop):
                return (first, last) if wire == 2 else None
    return None


def _first_integer(data: mmap.mmap, at: int, end: int) -> int | None:
    """A feature's first integer: Feature.int64_list (3), its value (1), packed or not."""
    for number, _, start, stop in _fields(data, at, end):
        if number == 3:
            for _, wire, first, last in _fields(data, start, stop):
                if wire == 0 or first == last:
                    return first if wire == 0 else None
                return _varint(data, first)[0]
    return None


def _walk_recordio(shard: Path, left_out: LeftOut) -> Iterator[Entry]:
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
            if part == 0:
                flag, label = struct.unpack_from("<If", data, at + 8)
                header = 24 + 4 * flag
                if length > header:
                    if flag > 0:
                        (label,) = struct.unpack_from("<f", data, at + 32)
                    label = class_number(label, f"{shard}: record {number}")
                    yield Entry(f"{number}", at + 8 + header, length - header, label)
                else:
                    left_out.add("records without an image", f"{shard.name}#{number}")
            elif part == 1:  # its bytes happen to hold the magic word: one in some 100,000 images
                left_out.add("records that are stored in parts", f"{shard.name}#{number}")
            number += part in (0, 3)
            at += 8 + (length + 3) // 4 * 4
