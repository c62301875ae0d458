"""The images in a tar: WebDataset's KEY.jpg with KEY.cls or KEY.json.

KEY reaches to the last dot, so a.b.jpg goes with a.b.cls; only where there is no such label, KEY reaches to
the first dot, as WebDataset has it. Where several members have one name (two tars that were joined with cat,
a file that was added again), the first image goes with the first label and so on. Hard and symbolic links are
followed inside the tar.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scalesnn.base import UserError
from scalesnn.data.index import IMAGE_EXTENSIONS
from scalesnn.data.labels import class_number, label_of_json
from scalesnn.data.walking import HIDDEN, LeftOut, is_hidden

__all__ = ["Entry", "walk_tar"]

_LABEL_EXTENSIONS = (".cls", ".json")


class Entry(NamedTuple):
    """One image of a shard."""

    name: str
    offset: int
    length: int
    label: int


class _Member(NamedTuple):
    """A file in a tar: its normalised name, and where its bytes are."""

    name: str
    offset: int
    length: int


def walk_tar(shard: Path, left_out: LeftOut) -> Iterator[Entry]:
    """The labelled images of a tar, in its order; what else is in it goes to ``left_out``.

    Raises:
        UserError: an image without a label, labels that do not fit, or a sparse member.
        tarfile.TarError, OSError, ValueError: it is damaged.
    """
    images: dict[str, list[_Member]] = {}  # by KEY, both
    labels: dict[tuple[str, str], list[_Member]] = {}
    with open(shard, "rb") as file:
        for member in _files(file, shard, left_out):
            key, extension = posixpath.splitext(member.name)
            extension = extension.lower()
            if extension in IMAGE_EXTENSIONS:
                images.setdefault(key, []).append(member)
            elif extension in _LABEL_EXTENSIONS:
                labels.setdefault((key, extension), []).append(member)
            else:
                left_out.add("members that are neither image nor label", f"{shard.name}#{member.name}")
        entries = [
            Entry(image.name, image.offset, image.length, _number(file, label, shard))
            for image, label in _pairs(images, labels, shard, left_out)
        ]
    yield from sorted(entries, key=lambda entry: entry.offset)


def _pairs(
    images: dict[str, list[_Member]],
    labels: dict[tuple[str, str], list[_Member]],
    shard: Path,
    left_out: LeftOut,
) -> Iterator[tuple[_Member, _Member]]:
    """Each image with its label."""
    used: set[str] = set()
    for key, members in images.items():
        found = _labels_of(key, labels)
        if found is None:
            folder, _, base = key.rpartition("/")
            key = posixpath.join(folder, base.partition(".")[0])
            found = _labels_of(key, labels)
            if found is not None and (key in images or key in used):
                for member in members:
                    left_out.add("further images of a key", f"{shard.name}#{member.name}")
                continue
        if found is None:
            raise UserError(
                f"{shard}: {members[0].name} has no label: expected {posixpath.splitext(members[0].name)[0]}"
                ".cls beside it"
            )
        used.add(key)
        if len(found) != len(members):
            names = sorted({member.name for member in members})
            raise UserError(
                f"{shard}: {len(members)} images for {len(found)} label{'s' * (len(found) > 1)} "
                f"of {key} ({', '.join(names)})"
            )
        yield from zip(members, found, strict=True)
    for (key, _), members in labels.items():
        if key not in used:
            for member in members:
                left_out.add("labels without an image", f"{shard.name}#{member.name}")


def _labels_of(key: str, labels: dict[tuple[str, str], list[_Member]]) -> list[_Member] | None:
    return labels.get((key, ".cls")) or labels.get((key, ".json"))


def _number(file: BinaryIO, label: _Member, shard: Path) -> int:
    text = os.pread(file.fileno(), label.length, label.offset)
    where = f"{shard}: {label.name}"
    return class_number(text, where) if label.name.lower().endswith(".cls") else label_of_json(text, where)


def _files(file: BinaryIO, shard: Path, left_out: LeftOut) -> list[_Member]:
    """The files of a tar, in its order, links replaced by what they lead to."""
    found: list[_Member | tuple[str, str]] = []  # a link is (name, target)
    places: dict[str, _Member | tuple[str, str]] = {}
    for member in _members(file):
        name = posixpath.normpath(member.name).replace("//", "/")  # normpath keeps two at the beginning
        if member.isdir():
            continue
        if member.issparse():
            raise UserError(f"{shard}: {name} is stored sparse, without its zeros: make the tar without -S")
        entry: _Member | tuple[str, str]
        if member.isreg():
            entry = _Member(name, member.offset_data, member.size)
        elif member.islnk() or member.issym():
            start = "" if member.islnk() else posixpath.dirname(name)
            entry = (name, posixpath.normpath(posixpath.join(start, member.linkname)))
        else:
            left_out.add("members that are no files", f"{shard.name}#{name}")
            continue
        if isinstance(entry, _Member) or name not in places:
            places[name] = entry
        if any(is_hidden(part) for part in name.split("/")):
            left_out.add(HIDDEN, f"{shard.name}#{name}")
        else:
            found.append(entry)
    result = []
    for entry in found:
        target: _Member | tuple[str, str] | None = entry
        for _ in range(40):  # as many links as Linux follows
            if not isinstance(target, _Member) and target is not None:
                target = places.get(target[1])
        if isinstance(target, _Member):
            result.append(target._replace(name=entry[0]))
        else:
            left_out.add("links that lead nowhere", f"{shard.name}#{entry[0]}")
    return result


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, or of several that lie one after another in a file.

    Raises:
        ValueError: it ends before its end mark. tarfile takes a cut, or a damaged header, for the end.
    """
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:  # tarfile would go back to the same header for ever
                    raise ValueError(f"{member.name} claims {member.size} bytes")
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                yield member
            end = tar.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"it is cut off, or damaged at byte {end}")
        start = _next_header(file)


def _next_header(file: BinaryIO) -> int | None:
    """Where something other than zeros follows, from a block's beginning on; None at the end of the file."""
    while block := file.read(2048 * tarfile.BLOCKSIZE):
        if rest := block.lstrip(b"\0"):
            at = file.tell() - len(rest)
            return at - at % tarfile.BLOCKSIZE
    return None
