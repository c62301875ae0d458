"""The loader on torchvision and Pillow: the reference, and for platforms without DALI.

Order, draws, bad images and resume are those of the DALI loader; only the pixels' last digits differ.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from scalesnn.data.augment import Recipe, draw_train
from scalesnn.data.headers import BadImageError, decode_rgb
from scalesnn.data.index import ImageIndex
from scalesnn.data.loader import Loader, LoaderSettings
from scalesnn.data.mixing import Mixer
from scalesnn.data.sampling import BatchKeys
from scalesnn.data.torchvision_operations import apply_policy
from scalesnn.data.transfer import to_device
from scalesnn.data.worker_processes import batches_of_workers, init_worker

__all__ = ["TorchvisionLoader"]

_Key = tuple[int, int, int]  # epoch, image, copy


class _Images(Dataset[tuple[Tensor | None, int, list[tuple[int, str]]]]):
    """Images by (epoch, image, copy), in a worker process.

    An entry is (uint8 or float image [3, H, W] or None, the image that was read, bad images met on the way).
    """

    def __init__(self, index: ImageIndex, settings: LoaderSettings) -> None:
        self.index, self.settings = index, settings
        self.known_bad: dict[int, str] = {}

    def __getitem__(self, key: _Key) -> tuple[Tensor | None, int, list[tuple[int, str]]]:
        epoch, image, copy = key
        found: list[tuple[int, str]] = []
        chosen = image
        for _ in range(len(self.index)):
            reason = self.known_bad.get(chosen)
            if reason is None:
                try:
                    pixels = decode_rgb(self.index.read(chosen))
                    return self._transform(pixels, epoch, image, copy), chosen, found
                except BadImageError as error:
                    reason = str(error)
                except FileNotFoundError:
                    reason = "the file is gone"
                except OSError as error:
                    reason = f"cannot be read: {error.strerror or error}"
                self.known_bad[chosen] = reason
            found.append((chosen, reason))
            if not self.settings.train or not self.settings.skip_bad:
                return None, image, found
            chosen = (chosen + 1) % len(self.index)
        return None, image, found

    def _transform(self, pixels: np.ndarray, epoch: int, image: int, copy: int) -> Tensor:
        settings = self.settings
        if settings.train:
            return train_transform(pixels, settings.recipe, settings.seed, epoch, image, copy)
        return evaluation_transform(pixels, settings.recipe)


def _normalised(picture: Image.Image, recipe: Recipe) -> Tensor:
    return F.normalize(F.to_tensor(picture), list(recipe.mean), list(recipe.std))


def train_transform(
    pixels: np.ndarray, recipe: Recipe, seed: int, epoch: int, image: int, copy: int
) -> Tensor:
    """The training recipe on decoded pixels, uint8 [H, W, 3] → float32 [3, size, size]."""
    keys = BatchKeys(np.array([image]), np.array([copy]), np.zeros(1, np.int64), np.zeros(1, np.int64))
    draws = draw_train(recipe, seed, epoch, keys, np.array([pixels.shape[:2]]))
    mode = InterpolationMode(recipe.interpolation)
    top, left, height, width = draws.crop[0].tolist()
    size = [recipe.train_crop_size, recipe.train_crop_size]
    picture = F.resized_crop(Image.fromarray(pixels), top, left, height, width, size, mode)
    if draws.flip[0]:
        picture = F.hflip(picture)
    if draws.policy is not None:
        picture = apply_policy(picture, draws.policy, mode)
    tensor = _normalised(picture, recipe)
    top, left, height, width = draws.erase[0].tolist()
    tensor[:, top : top + height, left : left + width] = 0
    return tensor


def evaluation_transform(pixels: np.ndarray, recipe: Recipe) -> Tensor:
    """Resize and centre crop, uint8 [H, W, 3] → float32 [3, size, size]."""
    mode = InterpolationMode(recipe.interpolation)
    picture = F.resize(Image.fromarray(pixels), [recipe.val_resize_size], mode)
    return _normalised(F.center_crop(picture, [recipe.val_crop_size]), recipe)


def _collate(entries: list[Any]) -> tuple[Tensor | None, list[bool], list[int], list[tuple[int, str]]]:
    """Stack what could be read."""
    good = [tensor for tensor, _, _ in entries if tensor is not None]
    stacked = torch.stack(good) if good else None
    found = [bad for _, _, bads in entries for bad in bads]
    return (
        stacked,
        [tensor is not None for tensor, _, _ in entries],
        [image for _, image, _ in entries],
        found,
    )


class _Plan:
    """The lists of keys that the worker processes work through, made as they are asked for."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[_Key]]:
        for number in range(self.start, len(self.loader)):
            keys = self.loader.keys(self.epoch, number)
            if len(keys):
                yield [
                    (self.epoch, image, copy)
                    for image, copy in zip(keys.images.tolist(), keys.copies.tolist(), strict=True)
                ]


class TorchvisionLoader(Loader):
    """Loads images with Pillow in ``workers`` processes (0: in this one); arguments as ``Loader``."""

    def __init__(
        self, index: ImageIndex, settings: LoaderSettings, mixer: Mixer | None = None, repetitions: int = 1
    ) -> None:
        super().__init__(index, settings, mixer, repetitions)
        self.images = _Images(index, settings)

        self._plan = _Plan(self)
        self._batches_of_processes: Any = DataLoader(
            self.images,
            batch_sampler=self._plan,
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch if settings.workers else None,
            persistent_workers=settings.workers > 0,
            collate_fn=_collate,
            worker_init_fn=init_worker,
            pin_memory=settings.pin_memory and settings.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the generator that the model's dropout uses
        )

    def _batches(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor, BatchKeys], None, None]:
        settings = self.settings
        self._plan.epoch, self._plan.start = epoch, start
        results = batches_of_workers(self._batches_of_processes)
        size = settings.recipe.train_crop_size if settings.train else settings.recipe.val_crop_size
        for number in range(start, len(self)):
            keys = self.keys(epoch, number)
            stacked, good, read, found = next(results) if len(keys) else (None, [], [], [])
            for image, reason in found:
                self.bad.add(image, reason)
                self.images.known_bad[image] = reason
            mask = np.array(good, bool)
            chosen = np.array(read, np.int64)[mask]
            self.bad.replaced += int((~mask).sum() + (chosen != keys.images[mask]).sum())
            if stacked is None:
                stacked = torch.empty((0, 3, size, size))
            images = stacked.to(settings.device, settings.dtype, non_blocking=True)
            labels = to_device(torch.from_numpy(self.index.labels[chosen]), settings.device)
            yield images.contiguous(memory_format=torch.channels_last), labels, keys.select(mask)

    def close(self) -> None:
        """End a running epoch and the worker processes."""
        super().close()
        self._batches_of_processes = None
