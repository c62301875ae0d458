"""The list of a data set's images: where the bytes of each are, and its class.

An ``ImageIndex`` is a small set of arrays, and ``read(i)`` gives the bytes of image i. A folder of images and
a set of shards (see shards.py) differ only in where the bytes lie, so order, augmentation, evaluation and
resume are the same code for all formats.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from scalesnn.base import UserError, printable
from scalesnn.data.walking import HIDDEN, LeftOut, is_folder, is_hidden, walk_classes

__all__ = ["IMAGE_EXTENSIONS", "ImageIndex", "class_folders", "index_folder"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


_MOST_OPEN = 256  # shards that stay open; 1024 files a process is a usual limit


class ImageIndex:
    """The images of one split.

    Args:
        classes: class names, sorted; labels are places in this list.
        labels: int64 [N].
        files: the files that hold bytes: one an image, or the shards.
        names: a name for each image, relative to ``root``, for messages.
        root: the folder that everything is relative to.
        shard, offset, length: int64 [N] each, where image i lies inside ``files[shard[i]]``; None where every
            image is a file of its own, and ``files[i]`` is image i.
        left_out: what the listing left out, a line for the user or nothing.
        sources: what the list was made from: folders and shards relative to ``root``, with their state_of.
    """

    def __init__(
        self,
        classes: list[str],
        labels: np.ndarray,
        files: list[str],
        root: Path,
        *,
        names: list[str] | None = None,
        shard: np.ndarray | None = None,
        offset: np.ndarray | None = None,
        length: np.ndarray | None = None,
        left_out: list[str] | None = None,
        sources: dict[str, str] | None = None,
    ) -> None:
        self.classes = classes
        self.labels = np.asarray(labels, np.int64)
        self.files = files
        self.root = root
        self.names = files if names is None else names
        self.shard, self.offset, self.length = shard, offset, length
        self.left_out, self.sources = left_out or [], sources or {}
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, image: int) -> bytes:
        """The bytes of image ``image``. Threads may call this at the same time.

        Raises:
            OSError: the file cannot be read, or ends before the image does.
        """
        if self.shard is None or self.offset is None or self.length is None:
            with open(os.path.join(self.root, self.files[image]), "rb", buffering=0) as file:
                return file.read()
        shard, length = int(self.shard[image]), int(self.length[image])
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            opened = os.open(os.path.join(self.root, self.files[shard]), os.O_RDONLY)
            try:
                data = os.pread(opened, length, int(self.offset[image]))
            finally:
                if (
                    len(self._descriptors) >= _MOST_OPEN
                    or self._descriptors.setdefault(shard, opened) != opened
                ):
                    os.close(opened)  # or another thread was first
        else:
            data = os.pread(descriptor, length, int(self.offset[image]))
        if len(data) < length:
            raise OSError(f"{self.files[shard]} ends inside {self.names[image]}")
        return data

    def path(self, image: int) -> str:
        """The full name of image ``image``; an image in a shard is SHARD#NAME."""
        if self.shard is None:
            return os.path.join(self.root, self.names[image])
        return f"{os.path.join(self.root, self.files[int(self.shard[image])])}#{self.names[image]}"

    def readable(self, image: int) -> str:
        """``path`` for messages: a name that is not UTF-8 can be printed, too."""
        return printable(self.path(image))

    def without(self, bad: set[str]) -> ImageIndex:
        """The index without the images whose ``path`` is in ``bad``."""
        return self.select(np.array([self.path(image) not in bad for image in range(len(self))], bool))

    def select(self, keep: np.ndarray) -> ImageIndex:
        """The index of the images where ``keep`` (bool [N]) is true."""
        if keep.all():
            return self
        chosen = np.flatnonzero(keep)
        names = [self.names[image] for image in chosen]
        if self.shard is None or self.offset is None or self.length is None:
            return ImageIndex(self.classes, self.labels[keep], names, self.root, left_out=self.left_out)
        return type(self)(
            self.classes,
            self.labels[keep],
            self.files,
            self.root,
            names=names,
            shard=self.shard[keep],
            offset=self.offset[keep],
            length=self.length[keep],
            left_out=self.left_out,
        )

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the list of images, their order or their labels."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Close the shards that reading opened; the index may be used again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": {}}


def class_folders(root: Path) -> list[os.DirEntry[str]]:
    """The folders in ``root``, without the hidden ones."""
    with os.scandir(root) as entries:
        return [entry for entry in entries if is_folder(entry) and not is_hidden(entry.name)]


def index_folder(
    root: Path, classes: list[str] | None = None, extensions: tuple[str, ...] = IMAGE_EXTENSIONS
) -> ImageIndex:
    """List ROOT/CLASS/*.jpg and the like, as torchvision's ImageFolder does: classes and files in sorted
    order.

    Args:
        root: the folder of one split.
        classes: the classes of the training split, where this is the validation split: the folders must be
            the same.
        extensions: which files count (in any case).

    Raises:
        UserError: no folder, no class folder, a class without an image, or other classes than ``classes``.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: the data folder must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
    walk = walk_classes(root, [entry.name for entry in class_folders(root)], extensions)
    found = list(walk.files)
    if not found:
        raise UserError(f"{root} holds no class folders: expected {root}/CLASS/*.jpg")
    if classes is not None:
        missing, unknown = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        if missing:
            raise UserError(f"{root} has no folder for {_some(missing, 'class')} of the training images")
        if unknown:
            raise UserError(f"{root} has {_some(unknown, 'class')} that the training images do not have")
    left_out = _beside_classes(root)
    left_out.merge(walk.left_out)
    remarks = left_out.lines(root)
    empty = [name for name, files in walk.files.items() if not files]
    if empty:
        raise UserError(
            "; ".join(
                [f"{root}: no image in {_some(empty, 'class')}; known are {' '.join(extensions)}", *remarks]
            )
        )
    files = [file for group in walk.files.values() for file in group]
    labels = np.repeat(np.arange(len(found)), [len(group) for group in walk.files.values()])
    return ImageIndex(found, labels, files, root, left_out=remarks, sources=walk.folders)


def _beside_classes(root: Path) -> LeftOut:
    """What lies in a split's folder but in no class folder; hidden files are usual there."""
    found = LeftOut()
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                if is_folder(entry):
                    found.add(HIDDEN, entry.name)
            elif not is_folder(entry):
                found.add("files beside the class folders", entry.name)
    return found


def _some(names: list[str], what: str) -> str:
    """'class a', or 'classes a, b, c and 7 more'."""
    if len(names) == 1:
        return f"{what} {names[0]}"
    plural = what + ("es" if what.endswith("s") else "s")
    tail = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{plural} {', '.join(names[:3])}{tail}"
