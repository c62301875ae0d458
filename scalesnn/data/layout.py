"""Where the splits of a data folder lie: DIR/train and DIR/val, or what SpikingJelly's data sets write.

SpikingJelly integrates events into DIR/frames_number_T_split_by_number (or _time), with folders train and
test (DVS128 Gesture, N-MNIST) or with class folders alone (CIFAR10-DVS, N-Caltech101).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scalesnn.base import UserError
from scalesnn.data.index import ImageIndex, class_folders
from scalesnn.data.listing import holds_frames, open_index

__all__ = ["Layout", "find_layout", "hold_out", "open_splits"]

_FRAMES_FOLDER = re.compile(r"(frames_number|duration)_\d+.*")


@dataclass(frozen=True)
class Layout:
    """Where to find the images.

    Attributes:
        train, val: the splits' folders; the same where the data are not split, see ``hold_out``.
        notices: what a user should know about the choice.
    """

    train: Path
    val: Path
    notices: tuple[str, ...] = ()

    @property
    def there(self) -> list[Path]:
        """The folders that exist, each once."""
        return [folder for folder in dict.fromkeys((self.train, self.val)) if folder.is_dir()]


def find_layout(root: Path) -> Layout:
    """The splits of the folder ``root``; DIR/train and DIR/val where nothing else is found.

    Raises:
        UserError: several folders of frames to choose from.
    """
    train, val = root / "train", root / "val"
    if not train.is_dir():
        integrated = sorted(e.name for e in class_folders(root) if _FRAMES_FOLDER.fullmatch(e.name))
        if len(integrated) > 1:
            raise UserError(f"{root} holds {', '.join(integrated)}: name one of them")
        if integrated:
            inner = find_layout(root / integrated[0])
            return dataclasses.replace(
                inner, notices=(f"the frames are those of {integrated[0]}", *inner.notices)
            )
        if holds_frames(root):
            notice = f"{root} is not split: the last tenth of each class is for validation"
            return Layout(root, root, (notice,))
    if not val.is_dir() and holds_frames(train) and (root / "test").is_dir():
        return Layout(train, root / "test", (f"validation is on {root / 'test'}",))
    return Layout(train, val)


def open_splits(layout: Layout, cache: Path | None = None) -> tuple[ImageIndex, ImageIndex]:
    """The images to train and to validate on; arguments and errors as for ``open_index``."""
    train = open_index(layout.train, cache=cache)
    if layout.val == layout.train:
        return hold_out(train)
    return train, open_index(layout.val, train.classes, cache)


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
