"""``scalesnn data subset`` makes a smaller data set out of an image folder, without copying the images."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np

from scalesnn.base import UserError, printable
from scalesnn.data.index import ImageIndex
from scalesnn.data.layout import find_layout, open_splits
from scalesnn.data.listing import BAD_LIST, bad_list_name, read_bad_list

__all__ = ["SUBSET_LIST", "add_subset_command", "choose_classes", "choose_images", "make_subset"]

SUBSET_LIST = "subset.txt"


def _drawn(seed: int, name: str) -> bytes:
    """A number that is drawn for ``name`` alone: it depends on no other name and on no order."""
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def choose_classes(classes: list[str], count: int, seed: int) -> list[str]:
    """Choose ``count`` of ``classes`` by ``seed``; sorted.

    Raises:
        UserError: there are not so many.
    """
    if not 1 <= count <= len(classes):
        raise UserError(
            f"--classes must lie between 1 and {len(classes)}, the classes there are; got {count}"
        )
    return sorted(sorted(classes, key=lambda name: _drawn(seed, name))[:count])


def choose_images(index: ImageIndex, fraction: Fraction, seed: int) -> list[str]:
    """Choose ⌈n · fraction⌉ of the n images of every class; a larger fraction keeps what a smaller one chose.

    Returns:
        names relative to ``index.root``, in the index's order.
    """
    chosen: list[int] = []
    for label in range(len(index.classes)):
        images = np.flatnonzero(index.labels == label).tolist()
        images.sort(key=lambda image: _drawn(seed, index.names[image]))
        chosen += images[: math.ceil(len(images) * fraction)]
    return [index.names[image] for image in sorted(chosen)]


def make_subset(
    source: Path, target: Path, fraction: Fraction, seed: int, classes: int | None = None, quiet: bool = True
) -> list[str]:
    """Link a share of the training images of ``source``, and all validation images of their classes.

    ``target`` appears when it is complete: what is interrupted leaves nothing.

    Args:
        source: folder with train/CLASS and val/CLASS, of images or event frames.
        target: new folder, outside ``source``.
        fraction: share of each class's training images, above 0 and at most 1.
        seed: of the choice of images and classes.
        classes: how many classes to keep; None: all.
        quiet: show no progress.

    Returns:
        what was made and what was left out, lines for the user.

    Raises:
        UserError: a folder or number that cannot be, or a file that can be neither linked nor copied.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction is a share, above 0 and at most 1, got {float(fraction):g}")
    if not source.is_dir():
        raise UserError(f"no folder {source}")
    if os.path.lexists(target):
        raise UserError(f"{target} exists: name a new folder")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} lies inside {source}: name a folder outside it")
    train, val = _class_folders(source)
    kept = set(choose_classes(train.classes, classes, seed) if classes is not None else train.classes)
    chosen = {"train": choose_images(train, fraction, seed), "val": val.names}
    parts = {
        split: [name for name in part if name.split("/", 1)[0] in kept] for split, part in chosen.items()
    }
    folders = {"train": train.root, "val": val.root}
    files = {f"{split}/{name}": folders[split] / name for split, part in parts.items() for name in part}
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        copied = _link(files, partial, source, quiet)
        title = f"# {fraction} of each class of {source.resolve()}, seed {seed}, {len(kept)} classes\n"
        (partial / SUBSET_LIST).write_text(
            title + "\n".join(map(bad_list_name, files)) + "\n", encoding="utf-8", errors="surrogateescape"
        )
        partial.rename(target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}; nothing was made") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    how = f"{len(files) - copied} hard links"
    if copied:
        how += f", {copied} copies, because links from there to {target} are not possible"
    left_out = list(dict.fromkeys([*train.left_out, *val.left_out]))
    return [
        *left_out,
        f"{len(parts['train'])} training and {len(parts['val'])} validation images of {len(kept)} classes "
        f"in {target} ({how}); list in {target / SUBSET_LIST}",
    ]


def _class_folders(source: Path) -> tuple[ImageIndex, ImageIndex]:
    """Training and validation images of class folders, without those that a list names as bad."""
    train, val = open_splits(find_layout(source))
    if train.shard is not None or val.shard is not None:
        raise UserError(f"{source} holds shards: subset links single files, from folders train/CLASS")
    listed = source / BAD_LIST
    if listed.is_file():
        bad = read_bad_list(listed, source)
        train, val = train.without(bad), val.without(bad)
    return train, val


def _link(files: dict[str, Path], target: Path, source: Path, quiet: bool) -> int:
    """Link, or copy, each of ``files`` to its name below ``target``; returns how many were copied."""
    from rich.progress import track

    for folder in {os.path.dirname(name) for name in files}:
        (target / folder).mkdir(parents=True, exist_ok=True)

    def link(name: str) -> bool:
        # A relative link in the source would lead nowhere from the target: link the file itself.
        file, made = os.path.realpath(files[name]), target / name
        try:
            os.link(file, made)
        except FileNotFoundError as error:
            raise UserError(
                f"{files[name]} is gone, or a link that leads nowhere: `scalesnn data check {source}` "
                "lists such files, and subset then leaves them out"
            ) from error
        except OSError:  # another file system, one without hard links, or somebody else's files
            shutil.copy2(file, made)
            return True
        return False

    pool = ThreadPoolExecutor(16)
    try:
        return sum(track(pool.map(link, files), "linking", total=len(files), disable=quiet))
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption does not wait for what has not begun


def _fraction(text: str) -> Fraction:
    """``0.03125`` or ``1/32``, exactly: 0.07 of 100 images are 7."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number such as 0.03125 or 1/32, got {text!r}") from None


def run_subset(args: argparse.Namespace) -> int:
    """The command ``subset``."""
    made = make_subset(
        Path(args.folder), Path(args.target), args.fraction, args.seed, args.classes, args.quiet
    )
    print(*map(printable, made), sep="\n")
    return 0


def add_subset_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``subset`` to the data commands."""
    parser = commands.add_parser(
        "subset",
        help="make a smaller data set of hard links",
        description="Link a share of the training images of each class of DIR, and all validation images, "
        "into the new folder OUT. The choice depends on the files' names and the seed only.",
    )
    parser.add_argument("folder", metavar="DIR", help="data folder with train/CLASS and val/CLASS")
    parser.add_argument("target", metavar="OUT", help="new folder, outside DIR")
    parser.add_argument(
        "--fraction",
        type=_fraction,
        required=True,
        metavar="F",
        help="share of each class, rounded up to whole images: 0.03125, or 1/32",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice (0)")
    parser.add_argument(
        "--classes",
        type=int,
        default=None,
        metavar="N",
        help="number of classes, chosen by the seed; default: all",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run_subset)
