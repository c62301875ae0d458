"""Where the splits of a data folder lie: DIR/train and DIR/val, or as SpikingJelly and Hugging Face do it.

SpikingJelly integrates events into DIR/frames_number_T_split_by_number (or _time), with folders train and
test (DVS128 Gesture, N-MNIST) or with class folders alone (CIFAR10-DVS, N-Caltech101). Hugging Face puts
DIR/data/train-00000-of-00294.parquet, … and DIR/data/validation-00000-of-00014.parquet beside each other.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalesnn.base import UserError, printable
from scalesnn.data.index import ImageIndex, class_folders
from scalesnn.data.listing import holds_frames, open_index
from scalesnn.data.parquet import parquet_files

__all__ = ["Layout", "check_classes", "find_layout", "hold_out", "open_splits", "remark_on_depth"]

_VALIDATION = ("val", "validation", "valid", "dev", "test")
_FEW = 32  # folders to look into for parquet files: more of them are classes
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
_FRAMES_FOLDER = re.compile(r"(frames_number|duration)_\d+.*")


@dataclass(frozen=True)
class Layout:
    """Where to find the images.

    Attributes:
        train, val: the splits' paths, see ``make_index``; the same where the data are not split, see
            ``hold_out``.
        notices: what a user should know about the choice.
    """

    train: Path
    val: Path
    notices: tuple[str, ...] = ()

    @property
    def there(self) -> dict[str, Path]:
        """The splits that exist, each path once, by name: train, val."""
        splits = {"val": self.val, "train": self.train}
        paths = {path: name for name, path in splits.items() if path.is_dir() or parquet_files(path)}
        return {paths[path]: path for path in (self.train, self.val) if path in paths}


def find_layout(root: Path) -> Layout:
    """The splits of the folder ``root``; DIR/train and DIR/val where nothing else is found.

    Raises:
        UserError: several folders to choose from.
    """
    train = root / "train"
    if not root.is_dir():
        return Layout(train, root / "val")
    if train.is_dir():
        if (root / "val").is_dir() or not (holds_frames(train) or parquet_files(train)):
            return Layout(train, root / "val")
        return _named(train, lambda path: path.is_dir())
    if parquet_files(train):
        return _named(train, lambda path: bool(parquet_files(path)))
    folders = sorted(entry.name for entry in class_folders(root))
    inner = [name for name in folders if _FRAMES_FOLDER.fullmatch(name)]
    if not inner and len(folders) <= _FEW:
        inner = [name for name in folders if parquet_files(root / name / "train")]
    if len(inner) > 1:
        raise UserError(f"{root} holds {', '.join(inner)}: name one of them")
    if inner:
        found = find_layout(root / inner[0])
        return dataclasses.replace(found, notices=(f"the data are in {root / inner[0]}", *found.notices))
    if holds_frames(root):
        return Layout(root, root, (f"{root} is not split: the last tenth of each class is for validation",))
    return Layout(train, root / "val")


def _named(train: Path, there: Callable[[Path], bool]) -> Layout:
    """``train`` with the first of the names that a validation split may have."""
    val = next((train.with_name(name) for name in _VALIDATION if there(train.with_name(name))), None)
    if val is None:
        return Layout(train, train.with_name("val"))
    return Layout(train, val, () if val.name == "val" else (f"validation is on {val}",))


def open_splits(layout: Layout, cache: Path | None = None) -> tuple[ImageIndex, ImageIndex]:
    """The images to train and to validate on; arguments and errors as for ``open_index``, and see
    ``check_classes``."""
    if not layout.train.is_dir() and not parquet_files(layout.train):
        raise UserError(f"no folder {layout.train}{_meant(layout.train.parent)}")
    train = open_index(layout.train, cache=cache)
    check_classes(train)
    if layout.val == layout.train:
        return hold_out(train)
    return train, open_index(layout.val, train.classes, cache)


def _meant(root: Path) -> str:
    """Which folder --data-path may have meant instead of ``root``, as the end of a message."""
    below = [entry.path for entry in class_folders(root) if (Path(entry.path) / "train").is_dir()]
    if below:
        return f": is --data-path {min(below)} meant?"
    above = root.resolve().parent
    if root.resolve().name in _SPLITS and (above / "train").is_dir():
        return f": is --data-path {above} meant?"
    return ": the data folder must hold train/CLASS/*.jpg and val/CLASS/*.jpg"


def check_classes(index: ImageIndex) -> None:
    """Refuse training images of a single class, or whose classes are splits: every net is right about them.

    Raises:
        UserError: it names the folders below, which may be the classes.
    """
    root, names = index.root, index.classes
    if len(names) > 1 and not set(map(str.lower, names)) <= _SPLITS:
        return
    shown = ", ".join(names)
    if len(names) > 1:
        raise UserError(f"{root} has splits for classes, {shown}: is --data-path {root} meant?")
    if index.shard is not None:
        raise UserError(f"{root} has one class only: all {len(index)} labels are {shown}")
    inside = sorted(entry.name for entry in class_folders(root / names[0]))
    message = f"{root} has one class only, {shown}, so there is nothing to tell apart"
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        message += (
            f"; in it are the folders {', '.join(inside[:5])}{more}: if those are the classes, "
            f"they belong into {root} itself"
        )
    raise UserError(message)


def remark_on_depth(index: ImageIndex) -> list[str]:
    """A line where no class folder holds an image itself and several hold folders of one name: these may be
    the classes."""
    if index.shard is not None or any(name.count("/") < 2 for name in index.names):
        return []
    folders: dict[str, set[str]] = {}
    for name in index.names:
        top, below, _ = name.split("/", 2)
        folders.setdefault(below, set()).add(top)
    shared = sorted(name for name, tops in folders.items() if len(tops) > 1)
    if len(folders) < 2 or not shared:
        return []
    return [
        printable(
            f"the classes are {', '.join(index.classes[:3])}, but several of them hold folders of one name, "
            f"such as {', '.join(shared[:3])}: is DIR one level too high?"
        )
    ]


def hold_out(index: ImageIndex) -> tuple[ImageIndex, ImageIndex]:
    """Split each class of n ≥ 2 after its first ⌈0.9 n⌉ images, as SpikingJelly's split_to_train_test_set
    (0.9, …) does, but keep at least one for validation.

    Raises:
        UserError: no class has two images.
    """
    held = np.zeros(len(index), bool)
    for label in range(len(index.classes)):
        (images,) = np.nonzero(index.labels == label)
        if len(images) > 1:
            held[images[min(math.ceil(0.9 * len(images)), len(images) - 1) :]] = True
    if not held.any():
        raise UserError(f"{index.root} has one array a class: nothing is left to validate on")
    return index.select(~held), index.select(held)
