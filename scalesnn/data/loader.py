"""What both loaders share: epochs, sharding over ranks, bad images, mixing, waiting times."""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalesnn.base import UserError
from scalesnn.data.augment import Recipe
from scalesnn.data.headers import BadImageError
from scalesnn.data.index import ImageIndex
from scalesnn.data.mixing import Mixer
from scalesnn.data.sampling import BatchKeys, EvaluationOrder, TrainOrder

__all__ = ["BadImages", "Loader", "LoaderSettings"]

log = logging.getLogger("scalesnn.data")

_WAIT_SHARE = 0.05
_WAIT_BATCHES = 50
_MOST_BAD = 0.05


@dataclass(frozen=True)
class LoaderSettings:
    """What a loader needs to know besides its images.

    Attributes:
        recipe: what happens to an image.
        train: random order and augmentation, or evaluation.
        batch_size: images a rank and step.
        seed, rank, world_size: of the run.
        device, dtype: of the batches. float32, float16 or bfloat16.
        workers: threads (DALI) or processes (torchvision).
        prefetch: batches that are prepared ahead.
        skip_bad: replace bad images (leave them out in evaluation) instead of stopping.
        pin_memory: page-locked host memory for copies to a GPU (torchvision loader).
    """

    recipe: Recipe
    train: bool
    batch_size: int
    seed: int
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    workers: int
    prefetch: int = 3
    skip_bad: bool = True
    pin_memory: bool = True


@dataclass
class BadImages:
    """The images that turned out to be unreadable.

    Attributes:
        index: the images.
        skip: go on without them, or stop at the first.
        reasons: image → why it is bad.
        replaced: how often a bad image was replaced, or left out of an evaluation.
    """

    index: ImageIndex
    skip: bool
    reasons: dict[int, str] = field(default_factory=dict)
    replaced: int = 0

    def read(self, image: int) -> bytes:
        """The bytes of an image.

        Raises:
            BadImageError: they cannot be had.
        """
        attempt = 0
        while True:  # network file systems fail for a moment at times
            try:
                return self.index.read(image)
            except FileNotFoundError as error:
                raise BadImageError("the file is gone, or a link that leads nowhere") from error
            except OSError as error:
                if attempt == 2:
                    raise BadImageError(f"cannot be read: {error.strerror or error}") from error
                time.sleep(0.05 * 4**attempt)
                attempt += 1

    def add(self, image: int, reason: str) -> None:
        """Remember and log a bad image.

        Raises:
            UserError: bad images stop the run, or there are too many of them.
        """
        if image in self.reasons:
            return
        path = self.index.readable(image)
        if not self.skip:
            raise UserError(f"bad image {path}: {reason} (--bad-images skip goes on without it)")
        self.reasons[image] = reason
        log.warning("bad image %s: %s; it is left out", path, reason)
        if len(self.reasons) > max(20, _MOST_BAD * len(self.index)) or len(self.reasons) == len(self.index):
            raise UserError(
                f"{len(self.reasons)} of {len(self.index)} images below {self.index.root} are unreadable, "
                f"the last {path}: {reason}. Is the folder still there? `scalesnn data check` lists them all"
            )

    def replacement(self, image: int) -> int:
        """``image`` itself, or for a bad image the next good one of the index."""
        while image in self.reasons:
            image = (image + 1) % len(self.index)
        return image


class Loader(abc.ABC):
    """Batches of one split for one rank.

    ``len(loader)`` is the number of batches of an epoch, the same on every rank.

    Args:
        index: the images.
        settings: see LoaderSettings.
        mixer: mixup and cutmix, training only.
        repetitions: copies of an image that follow each other (repeated augmentation), training only.
    """

    def __init__(
        self, index: ImageIndex, settings: LoaderSettings, mixer: Mixer | None = None, repetitions: int = 1
    ) -> None:
        self.index = index
        self.settings = settings
        self.mixer = mixer if settings.train else None
        global_batch = settings.batch_size * settings.world_size
        self.order: TrainOrder | EvaluationOrder
        if settings.train:
            self.order = TrainOrder(len(index), global_batch, settings.seed, repetitions)
        else:
            self.order = EvaluationOrder(len(index), global_batch)
        self.bad = BadImages(index, settings.skip_bad)
        self.current_epoch = 0
        self.notices: list[str] = []
        self.stats: dict[str, Any] = {}
        self._waited = self._worked = 0.0
        self._timed = 0
        self._running: Generator[tuple[Tensor, Tensor], None, None] | None = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def number_of_images(self) -> int:
        """Images of the split, over all ranks."""
        return len(self.index)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch ``iter(loader)`` runs through."""
        self.current_epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(self.current_epoch)

    def keys(self, epoch: int, batch: int) -> BatchKeys:
        """The images of this rank's batch: what ``epoch`` will load, without loading it."""
        return self.order.rank_batch(epoch, batch, self.settings.rank, self.settings.world_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from batch ``start`` on.

        An epoch that is still running ends when the next one starts.

        Returns:
            pairs of images, [n, 3, H, W] in channels_last, normalised, on the device, in the compute dtype;
            and targets, int64 [n], or float32 [n, classes] where mixup or cutmix is on. In evaluation n may
            be smaller than the batch size, also 0.

        Raises:
            UserError: a bad image where bad images stop the run, or too many of them (while iterating).
        """
        self.stop()
        self._running = self._timed_epoch(epoch, start)
        return self._running

    def stop(self) -> None:
        """End a running epoch; what was prepared ahead is dropped."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _timed_epoch(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        batches = self._batches(epoch, start)
        try:
            for number in range(start, len(self)):
                asked = time.perf_counter()
                images, labels, keys = next(batches)
                if self.mixer is not None:
                    images, labels = self.mixer(images, labels, epoch, keys)
                given = time.perf_counter()
                self.stats = {
                    "data_wait_s": given - asked,
                    "bad_images": len(self.bad.reasons),
                    "replaced_images": self.bad.replaced,
                }
                yield images, labels
                self._count_wait(number - start, given - asked, time.perf_counter() - given)
        finally:
            batches.close()

    def _count_wait(self, number: int, waited: float, worked: float) -> None:
        """Say once when fifty batches were waited for too long; the first ones of an epoch do not count."""
        if number < self.settings.prefetch:
            return
        self._waited += waited
        self._worked += worked
        self._timed += 1
        if self._timed == _WAIT_BATCHES:
            share = self._waited / (self._waited + self._worked)
            self._waited, self._worked, self._timed = 0.0, 0.0, 0
            if share > _WAIT_SHARE and self.settings.train and not self.notices:
                notice = f"training waits for data {share:.0%} of the time: {self._advice()}"
                self.notices.append(notice)
                log.warning("%s", notice)

    def _advice(self) -> str:
        """What to change when the training waits for data."""
        return (
            f"raise --workers (now {self.settings.workers}) if there are idle cores, or make images cheaper "
            "(--auto-augment none, smaller images, `scalesnn data pack` on slow file systems)"
        )

    @abc.abstractmethod
    def _batches(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor, BatchKeys], None, None]:
        """Unmixed images, int64 labels and keys of this rank's batches ``start``, ``start`` + 1, …"""

    def close(self) -> None:
        """End a running epoch and give back threads, processes and files."""
        self.stop()
        self.index.close()
