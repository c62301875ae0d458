"""Data of a Trainer whose ``load_data`` returns torchvision datasets and samplers, as SpikingJelly's did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, default_collate

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
        """Images [n, 3, H, W] and targets of ``epoch`` from batch ``start`` on, on the device.

        Raises:
            UserError: samples that make no batch, see Collate.
        """
        self.set_epoch(epoch)
        for batch in islice(batches_of_workers(self.loader), start, None):
            if isinstance(batch, str):
                raise UserError(batch)
            images, targets = batch
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
        UserError: ``load_data`` returned something else, or data sets that nothing can be trained on.
    """
    if hasattr(loaded, "train") and hasattr(loaded, "val"):
        return loaded
    if not isinstance(loaded, tuple) or len(loaded) != 4:
        raise UserError(
            "load_data must return scalesnn.data.Data or "
            f"(dataset, dataset_test, train_sampler, test_sampler), got {type(loaded).__name__}"
        )
    dataset, dataset_test, train_sampler, test_sampler = loaded
    for which, one in (("training", dataset), ("validation", dataset_test)):
        check_length(one, which)
    classes = classes_of(dataset)
    if len(classes) < 2:
        shown = f"one class only, {classes[0]}" if classes else "no classes"
        raise UserError(f"load_data: the training set has {shown}, so there is nothing to tell apart")
    shape = shape_of_first(dataset, "training")
    shape_of_first(dataset_test, "validation")
    for which, one in (("training", dataset), ("validation", dataset_test)):
        check_labels(one, which, len(classes))
    common: dict[str, Any] = {
        "batch_size": args.batch_size,
        "num_workers": default_workers() if args.workers is None else args.workers,
        "worker_init_fn": init_worker,
        "pin_memory": device.type == "cuda" and not args.disable_pinmemory,
    }
    collate = Collate(len(classes), args.mixup_alpha, args.cutmix_alpha)
    train = DataLoader(dataset, sampler=train_sampler, collate_fn=collate, drop_last=True, **common)
    val = DataLoader(dataset_test, sampler=test_sampler, collate_fn=Collate(len(classes)), **common)
    return UserData(DatasetLoader(train, device), DatasetLoader(val, device), classes, shape)


def check_length(dataset: Any, which: str) -> None:
    """Refuse a dataset without samples, or whose samples cannot be asked for by number.

    Raises:
        UserError: it says so.
    """
    kind = type(dataset).__name__
    try:
        count = None if isinstance(dataset, IterableDataset) else len(dataset)
    except (TypeError, NotImplementedError):
        count = None
    if count is None or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"load_data: the {which} set, a {kind}, cannot be asked for sample i of n: it needs __getitem__ "
            "and __len__, so that every rank and every resume finds its samples"
        )
    if count == 0:
        raise UserError(f"load_data: the {which} set, a {kind}, is empty")


def classes_of(dataset: Any) -> list[str]:
    """The class names of a dataset, or of those that a ``torch.utils.data.Subset`` or ``ConcatDataset`` is
    of.

    Raises:
        UserError: it does not say what classes it has, or its parts have different ones.
    """
    if isinstance(dataset, ConcatDataset) and not hasattr(dataset, "classes"):
        parts = [classes_of(part) for part in dataset.datasets]
        different = next((part for part in parts if part != parts[0]), None)
        if different is not None:
            raise UserError(
                f"load_data: the parts of a ConcatDataset have different classes, {_some(parts[0])} and "
                f"{_some(different)}: a label would have two meanings"
            )
        return parts[0]
    if not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        return classes_of(dataset.dataset)
    names = getattr(dataset, "classes", None)
    if not isinstance(names, Sequence) or isinstance(names, str):
        what = "does not say what classes it has" if names is None else f"has .classes = {names!r:.40}"
        raise UserError(
            f"load_data: {type(dataset).__name__} {what}; give it a list of names: dataset.classes = [...]"
        )
    return [str(name) for name in names]


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def shape_of_first(dataset: Any, which: str) -> tuple[int, ...]:
    """The shape of the first sample; random generators stay as they were.

    Raises:
        UserError: it is no pair of a tensor and a label.
    """
    sample = _sample(dataset, 0)
    pair = isinstance(sample, (tuple, list)) and len(sample) == 2
    if not pair or not isinstance(sample[0], Tensor):
        got = f"({', '.join(type(part).__name__ for part in sample)})" if pair else type(sample).__name__
        raise UserError(
            f"load_data: a sample of the {which} set must be (tensor, label), got {got}; images become "
            "tensors by a transform such as torchvision.transforms.ToTensor()"
        )
    return tuple(sample[0].shape)


def _sample(dataset: Any, number: int) -> Any:
    state = random_state()
    try:
        return dataset[number]
    finally:
        restore_random_state(state)


def check_labels(dataset: Any, which: str, classes: int) -> None:
    """Refuse labels out of range where they are quickly found: in the first sample, and in the list that
    many datasets keep; later ones are found in their batch.

    Raises:
        UserError: it names the sample.
    """
    suspects = [0]
    listed = listed_labels(dataset)
    if listed is not None and len(listed) == len(dataset):
        suspects += ((listed < 0) | (listed >= classes)).nonzero()[:1].flatten().tolist()
    for number in suspects:  # the list is no proof: a transform may come after it
        fault = Collate(classes)([_sample(dataset, number)])
        if isinstance(fault, str):
            raise UserError(f"{fault}; sample {number} of the {which} set")


def listed_labels(dataset: Any) -> Tensor | None:
    """The labels int64 [N] that a dataset keeps in ``targets``, ``labels`` or a TensorDataset's second
    tensor, also behind Subset and ConcatDataset; None where there are none."""
    if isinstance(dataset, Subset):
        inner = listed_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [listed_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    tensors = list(getattr(dataset, "tensors", []))
    kept = getattr(dataset, "targets", getattr(dataset, "labels", tensors[1] if len(tensors) == 2 else None))
    try:
        labels = torch.as_tensor(kept)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.long() if labels.ndim == 1 and not labels.is_floating_point() else None


class Collate:
    """Make a batch of samples; mixup or cutmix it where the flags ask for it.

    Args:
        classes: how many there are.
        mixup, cutmix: the parameters of their Beta distributions; 0 switches one off.
    """

    def __init__(self, classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self.classes = classes
        self.mix = None
        if not (mixup > 0 or cutmix > 0):
            return
        from torchvision.transforms import v2  # late: it takes two seconds

        choices: list[Any] = []
        if mixup > 0:
            choices.append(v2.MixUp(alpha=mixup, num_classes=classes))
        if cutmix > 0:
            choices.append(v2.CutMix(alpha=cutmix, num_classes=classes))
        self.mix = v2.RandomChoice(choices)

    def __call__(self, samples: list[Any]) -> Any:
        """(images [n, C, H, W] or [n, T, C, H, W], targets [n] or [n, classes]); or a line that says why
        there is no batch: an exception would come out of a worker process with its traceback in it."""
        try:
            batch = default_collate(samples)
        except (RuntimeError, TypeError) as error:
            return f"load_data: samples that make no batch: {str(error).splitlines()[0]}"
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            return f"load_data: a sample must be (tensor, label), the label a number, got {samples[0]!r:.60}"
        images, targets = batch
        if targets.ndim != 2 or targets.shape[1] != self.classes:  # else shares of the classes
            if targets.ndim != 1 or targets.is_floating_point():
                kind = f"{targets.dtype} of shape {list(targets.shape[1:])}"
                return f"load_data: a label must be a whole number, got {kind}"
            targets = targets.long()
            wrong = targets[(targets < 0) | (targets >= self.classes)]
            if len(wrong):
                few = f"{self.classes} classes have labels 0 to {self.classes - 1}"
                return f"load_data: label {int(wrong[0])}, but {few}"
        if self.mix is None:
            return images, targets
        if images.ndim == 5:  # [n, T, C, H, W]: alike at every time-step
            from torchvision.tv_tensors import Video

            images, targets = self.mix(Video(images), targets)
            return images.as_subclass(Tensor), targets
        return self.mix(images, targets)
