"""Data of a Trainer whose ``load_data`` returns torchvision datasets and samplers, as SpikingJelly's did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from torchvision.tv_tensors import Video

from scalesnn.base import UserError
from scalesnn.data import default_workers
from scalesnn.data.worker_processes import batches_of_workers, init_worker
from scalesnn.training.random_state import random_state, restore_random_state

__all__ = ["DatasetLoader", "UserData", "as_data"]


class DatasetLoader:
    """A dataset and its sampler behind the interface of ``scalesnn.data.Loader``.

    The order is the sampler's, which only counts epochs: a resume in the middle of an epoch skips the
    batches that were seen, and draws new augmentations.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.number_of_images = len(loader.dataset)  # type: ignore[arg-type]
        self.stats: dict[str, float] = {}
        self._epoch = 0

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The current epoch (``set_epoch``)."""
        return self.epoch(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch comes."""
        self._epoch = epoch
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [n, 3, H, W] and targets of ``epoch`` from batch ``start`` on, on the device."""
        self.set_epoch(epoch)
        for images, targets in islice(batches_of_workers(self.loader), start, None):
            yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


@dataclass
class UserData:
    """What ``scalesnn.data.open_data`` returns, made of a user's datasets."""

    train: DatasetLoader
    val: DatasetLoader
    classes: list[str]
    sample_shape: tuple[int, ...]  # [C, H, W], or [T, C, H, W] of event frames
    notices: list[str] = field(default_factory=list)

    @property
    def frames_shape(self) -> tuple[int, ...] | None:
        """T, C, H, W where the samples are event frames; None for images."""
        return self.sample_shape if len(self.sample_shape) == 4 else None

    def close(self) -> None:
        """Nothing to close."""


def as_data(loaded: Any, args: Any, device: torch.device) -> Any:
    """Take what ``load_data`` returned: ``scalesnn.data.Data`` as it is, datasets and samplers wrapped.

    Raises:
        UserError: ``load_data`` returned something else.
    """
    if hasattr(loaded, "train") and hasattr(loaded, "val"):
        return loaded
    if not isinstance(loaded, tuple) or len(loaded) != 4:
        raise UserError(
            "load_data must return scalesnn.data.Data or "
            f"(dataset, dataset_test, train_sampler, test_sampler), got {type(loaded).__name__}"
        )
    dataset, dataset_test, train_sampler, test_sampler = loaded
    classes = classes_of(dataset)
    common: dict[str, Any] = {
        "batch_size": args.batch_size,
        "num_workers": default_workers() if args.workers is None else args.workers,
        "worker_init_fn": init_worker,
        "pin_memory": device.type == "cuda" and not args.disable_pinmemory,
    }
    train = DataLoader(
        dataset, sampler=train_sampler, collate_fn=Mixing(args, len(classes)), drop_last=True, **common
    )
    val = DataLoader(dataset_test, sampler=test_sampler, **common)
    shape = shape_of_first(dataset)
    return UserData(DatasetLoader(train, device), DatasetLoader(val, device), classes, shape)


def classes_of(dataset: Any) -> list[str]:
    """The class names of a dataset, or of the one that a ``torch.utils.data.Subset`` is of.

    Raises:
        UserError: it does not say what classes it has.
    """
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if not hasattr(dataset, "classes"):
        raise UserError(
            f"load_data: {type(dataset).__name__} does not say what classes it has; give it a list: "
            "dataset.classes = [...]"
        )
    return [str(name) for name in dataset.classes]


def shape_of_first(dataset: Any) -> tuple[int, ...]:
    """The shape of the first sample; random generators stay as they were."""
    state = random_state()
    try:
        return tuple(dataset[0][0].shape)
    finally:
        restore_random_state(state)


class Mixing:
    """Collate a batch; mixup or cutmix it where the flags ask for it."""

    def __init__(self, args: Any, classes: int) -> None:
        choices: list[Any] = []
        if args.mixup_alpha > 0:
            choices.append(v2.MixUp(alpha=args.mixup_alpha, num_classes=classes))
        if args.cutmix_alpha > 0:
            choices.append(v2.CutMix(alpha=args.cutmix_alpha, num_classes=classes))
        self.mix = v2.RandomChoice(choices) if choices else None

    def __call__(self, samples: list[Any]) -> Any:
        """(images [n, C, H, W] or [n, T, C, H, W], targets [n] or [n, classes])."""
        images, targets = default_collate(samples)
        if self.mix is None:
            return images, targets
        if images.ndim == 5:  # [n, T, C, H, W]: alike at every time-step
            images, targets = self.mix(Video(images), targets)
            return images.as_subclass(Tensor), targets
        return self.mix(images, targets)
