"""Right answers, counted: for several T at once, for each class, and for each pair of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Accuracy", "Tally", "wilson_interval"]


def wilson_interval(hits: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The interval that holds a share with 95 % confidence, of ``hits`` out of ``count`` (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


@dataclass
class Accuracy:
    """What was counted at one T.

    Attributes:
        T: time-steps.
        images: how many were seen.
        top1, top5: hits among them.
        of_class_K: images, and hits, of each class.
    """

    T: int
    images: int
    top1: int
    top5: int
    of_class_K: list[tuple[int, int]]

    def as_dict(self) -> dict[str, float]:
        """The figures in per cent, with Wilson's interval of top-1."""
        low, high = wilson_interval(self.top1, self.images)
        count = max(self.images, 1)
        return {
            "T": self.T,
            "images": self.images,
            "acc1": 100 * self.top1 / count,
            "acc1_low": 100 * low,
            "acc1_high": 100 * high,
            "acc5": 100 * self.top5 / count,
        }


class Tally:
    """Counts on the device; ``close`` adds up all ranks' counts.

    Args:
        steps: the Ts, ascending.
        classes: K.
    """

    def __init__(self, steps: list[int], classes: int, device: torch.device) -> None:
        self.steps, self.classes = steps, classes
        self.hits_T5K = torch.zeros(len(steps), 2, classes, dtype=torch.int64, device=device)
        self.confusion_KK = torch.zeros(
            classes, classes, dtype=torch.int64, device=device
        )  # at the largest T

    def add(self, T: int, logits_NK: Tensor, targets_N: Tensor) -> None:
        """Count the answers to a batch at one T."""
        if not len(targets_N):
            return
        best = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
        right = best == targets_N[:, None]
        place = self.steps.index(T)
        self.hits_T5K[place, 0].index_add_(0, targets_N, right[:, 0].long())
        self.hits_T5K[place, 1].index_add_(0, targets_N, right.any(1).long())
        if self.steps[-1] == T:
            answers = best[:, 0].clamp(max=self.classes - 1)  # of a head with more outputs than classes
            pairs = targets_N * self.classes + answers
            self.confusion_KK += pairs.bincount(minlength=self.classes**2).view_as(self.confusion_KK)

    def close(self, reduce_sum: Callable[[Tensor], Tensor]) -> list[Accuracy]:
        """Everything that all ranks counted, one entry a T; ``confusion_KK`` is that of all ranks then."""
        self.confusion_KK = reduce_sum(self.confusion_KK)
        images_K = self.confusion_KK.sum(1).tolist()
        return [
            Accuracy(T, sum(images_K), sum(top1), sum(top5), list(zip(images_K, top1, strict=True)))
            for T, (top1, top5) in zip(self.steps, reduce_sum(self.hits_T5K).tolist(), strict=True)
        ]

    def worst_pairs(self, count: int = 10) -> list[tuple[int, int, int]]:
        """The pairs that are confused most: (class, taken for, how often)."""
        wrong = self.confusion_KK.clone().fill_diagonal_(0).flatten()
        values, places = wrong.topk(min(count, len(wrong)))
        return [
            (place // self.classes, place % self.classes, value)
            for place, value in zip(places.tolist(), values.tolist(), strict=True)
            if value
        ]
