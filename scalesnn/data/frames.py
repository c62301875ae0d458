"""Event-camera frames: arrays [T, C, H, W] in .npy or .npz files, so that T comes from the data.

Files are CLASS/*.npz (with an array "frames") or CLASS/*.npy; see layout.py for the folders above them.
Frames are used as they are: no resizing, no normalisation, no flip (gestures have a left and a right) and no
policy; random erasing (the same rectangle at every time-step), mixup and CutMix apply.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from scalesnn.base import UserError
from scalesnn.data.augment import draw_erase
from scalesnn.data.headers import BadImageError
from scalesnn.data.index import ImageIndex
from scalesnn.data.loader import Loader, LoaderSettings
from scalesnn.data.mixing import Mixer
from scalesnn.data.reading import Prefetcher, RawBatch, Reader
from scalesnn.data.sampling import BatchKeys
from scalesnn.data.transfer import to_device

__all__ = ["FramesLoader", "decode_frames", "frames_shape"]


def decode_frames(data: bytes) -> np.ndarray:
    """The array of a .npy file, or of a .npz file the one named "frames" or the only one.

    Raises:
        BadImageError: not such a file, or not four dimensions of numbers.
    """
    if not data:
        raise BadImageError("the file is empty")
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            names = loaded.files
            frames = loaded["frames" if "frames" in names else names[0]]
            if "frames" not in names and len(names) != 1:
                raise BadImageError(f"has arrays {', '.join(names)}, but none named frames")
        else:
            frames = loaded
    except (ValueError, OSError, EOFError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise BadImageError(f"not a .npy or .npz file of numbers ({error})") from error
    if frames.ndim != 4 or frames.dtype.kind not in "buif":
        raise BadImageError(f"expected numbers [T, C, H, W], found {frames.dtype} {list(frames.shape)}")
    return frames


def frames_shape(index: ImageIndex) -> tuple[int, int, int, int]:
    """T, C, H, W of the first array of ``index`` that can be read.

    Raises:
        UserError: none can.
    """
    reason = "is empty"
    for image in range(min(len(index), _LOOKS)):
        try:
            shape = decode_frames(index.read(image)).shape
        except (OSError, BadImageError) as error:
            reason = f"holds no readable frames, the last {index.readable(image)}: {error}"
            continue
        return (shape[0], shape[1], shape[2], shape[3])
    raise UserError(f"{index.root} {reason}")


_LOOKS = 100  # files that may be bad before one tells the shape


class FramesReader(Reader):
    """Reads and decodes; an array of another shape than ``shape`` counts as bad."""

    shape: tuple[int, ...] = ()

    def _read_one(self, image: int) -> tuple[np.ndarray, tuple[int, int]]:
        data = self.bad.read(image)
        frames = decode_frames(data)
        if frames.shape != self.shape:
            raise BadImageError(f"has shape {list(frames.shape)}, the first has {list(self.shape)}")
        return np.ascontiguousarray(frames, np.float32), (frames.shape[2], frames.shape[3])


class FramesLoader(Loader):
    """Batches [n, T, C, H, W] in float32 or the compute dtype.

    Args:
        index, settings, mixer, repetitions: as for ``Loader``; of the recipe, only ``erase`` is used.
        shape: T, C, H, W of every array.
    """

    def __init__(
        self,
        index: ImageIndex,
        settings: LoaderSettings,
        mixer: Mixer | None = None,
        repetitions: int = 1,
        *,
        shape: tuple[int, int, int, int],
    ) -> None:
        super().__init__(index, settings, mixer, repetitions)
        self.shape = shape
        self.reader = FramesReader(self.bad, settings.train, max(1, settings.workers), chunk=2)
        self.reader.shape = shape

    def _prepare(self, epoch: int, number: int) -> tuple[RawBatch, Tensor]:
        settings = self.settings
        raw = self.reader.read(self.keys(epoch, number))
        images = torch.empty((len(raw.data), *self.shape))
        for row, data in enumerate(raw.data):
            images[row] = torch.from_numpy(data)
        if settings.train and settings.recipe.erase > 0:
            boxes = draw_erase(settings.recipe.erase, self.shape[2:], settings.seed, epoch, raw.keys)
            for row, (top, left, height, width) in enumerate(boxes.tolist()):
                images[row, :, :, top : top + height, left : left + width] = 0
        raw.data = []
        return raw, images

    def _batches(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor, BatchKeys], None, None]:
        settings = self.settings
        numbers = range(start, len(self))
        prefetcher = Prefetcher(lambda number: self._prepare(epoch, number), numbers, settings.prefetch)
        try:
            for _ in numbers:
                prepared = prefetcher.get()
                assert isinstance(prepared, tuple)
                raw, images = prepared
                self.bad.replaced += raw.replaced
                labels = torch.from_numpy(self.index.labels[raw.images])
                images = to_device(images.to(settings.dtype), settings.device, settings.pin_memory)
                yield images, to_device(labels, settings.device), raw.keys
        finally:
            prefetcher.close()

    def close(self) -> None:
        """End a running epoch and the reading threads."""
        super().close()
        self.reader.close()
