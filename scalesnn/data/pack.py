"""``scalesnn data pack`` turns millions of small files into shards; ``scalesnn data index`` stores the list
of a folder."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from scalesnn.base import UserError
from scalesnn.data.headers import BadImageError
from scalesnn.data.layout import find_layout
from scalesnn.data.listing import is_frames, make_index, store_index, stored_beside
from scalesnn.data.loader import BadImages
from scalesnn.data.parquet import ParquetIndex
from scalesnn.data.sampling import random_permutation
from scalesnn.data.shards import CLASSES_FILE, text_of_classes

__all__ = ["add_index_command", "add_pack_command", "pack_split"]


def _members(bad: BadImages, order: Iterable[int]) -> Iterator[tuple[str, bytes, int]]:
    """Name, bytes and label of each image; members are numbered, because keys must differ."""
    index = bad.index
    for place, image in enumerate(order):
        try:
            data = bad.read(image)
        except BadImageError as error:
            bad.add(image, str(error))
            continue
        extension = os.path.splitext(index.names[image])[1].lower() or ".jpg"
        yield f"{place:08d}{extension}", data, int(index.labels[image])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def pack_split(bad: BadImages, target: Path, shard_bytes: int, progress: bool = False) -> int:
    """Write images as WebDataset shards shard-NNNNNN.tar into the new folder ``target``.

    Images are shuffled once, so that a reader that goes through shards in order does not see one class after
    the other; scalesnn itself does not need that. Those of parquet files keep their order.

    Args:
        bad: the images; those that cannot be read are left out, logged and remembered here.
        target: the folder; made here.
        shard_bytes: a shard is closed when it has so many bytes of images.
        progress: show a bar.

    Returns:
        the number of shards.

    Raises:
        UserError: ``target`` is not empty, or too many images cannot be read.
    """
    from rich.progress import track

    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise UserError(f"{target} is not empty")
    count = len(bad.index)
    in_order = isinstance(bad.index, ParquetIndex)  # whose images are quick to read in groups only
    order = range(count) if in_order else random_permutation(0, 0, count).tolist()
    shards = 0
    rest = _members(bad, track(order, target.name, total=count, disable=not progress))
    for first in rest:
        size = 0
        with tarfile.open(target / f"shard-{shards:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data, label in itertools.chain([first], rest):
                _add(tar, name, data)
                _add(tar, f"{name.split('.')[0]}.cls", str(label).encode())
                size += len(data)
                if size >= shard_bytes:
                    break
        shards += 1
    return shards


def _splits(root: Path) -> dict[str, Path]:
    """The splits that are there, by name: train, val.

    Raises:
        UserError: neither is.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    splits = find_layout(root).there
    if not splits:
        raise UserError(f"{root} has neither a folder train nor a folder val")
    return splits


def run_pack(args: argparse.Namespace) -> int:
    """The command ``pack``. TARGET appears when it is complete: half of the shards would train, too."""
    source, target = Path(args.folder), Path(args.target)
    if args.shard_size < 1:
        raise UserError(f"--shard-size must be at least 1, got {args.shard_size}")
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty: name a new folder")
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    classes: list[str] | None = None
    try:
        for name, split in _splits(source).items():
            index = make_index(split, classes)
            if is_frames(index):
                raise UserError(f"{split} holds event frames: pack is for images")
            classes = classes or index.classes
            listed = text_of_classes(classes)
            bad = BadImages(index, skip=True)
            shards = pack_split(bad, partial / name, args.shard_size * 2**20, not args.quiet)
            index.close()
            unreadable = f", {len(bad.reasons)} left out that cannot be read" if bad.reasons else ""
            images = len(index) - len(bad.reasons)
            print(*index.left_out, f"{name}: {images} images in {shards} shards{unreadable}", sep="\n")
        (partial / CLASSES_FILE).write_bytes(listed)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _store(target)
    return 0


def _store(root: Path) -> None:
    """Store the index of each split of ``root`` beside its files."""
    classes: list[str] | None = None
    for split in _splits(root).values():
        index = make_index(split, classes)
        classes = classes or index.classes
        try:
            store_index(index, stored_beside(split))
        except OSError as error:
            raise UserError(
                f"{stored_beside(split)} cannot be written ({error.strerror}): train with --cache-dataset, "
                "which keeps the list beside the run"
            ) from error
        print(*index.left_out, f"{split}: {len(index)} images of {len(index.classes)} classes", sep="\n")


def run_index(args: argparse.Namespace) -> int:
    """The command ``index``."""
    _store(Path(args.folder))
    return 0


def add_pack_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``pack`` to the data commands."""
    parser = commands.add_parser(
        "pack",
        help="write images as WebDataset shards",
        description="Write the images of DIR/train and DIR/val as tar shards, for file systems that are slow "
        "with millions of small files. Train on TARGET with --data-path TARGET.",
    )
    parser.add_argument("folder", metavar="DIR", help="data folder")
    parser.add_argument("target", metavar="TARGET", help="new folder")
    parser.add_argument(
        "--shard-size", type=int, default=256, metavar="MIB", help="images a shard, in MiB (256)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run_pack)


def add_index_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``index`` to the data commands."""
    parser = commands.add_parser(
        "index",
        help="store the list of images beside them",
        description="List the images of DIR/train and DIR/val once and store the lists there: training then "
        "starts without walking through folders or shards. Run it again after a change; a list that is "
        "out of date is not used.",
    )
    parser.add_argument("folder", metavar="DIR", help="data folder")
    parser.set_defaults(run=run_index)
