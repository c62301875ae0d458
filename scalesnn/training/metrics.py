"""Accuracy, and averages that stay on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Averages", "accuracy", "fit_targets"]


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """Share of images whose class is among the k highest outputs, in per cent.

    Args:
        output: [N, classes].
        target: class numbers [N], or class weights [N, classes] (mixup): the heaviest class counts.
        topk: the ks; a k above the number of classes is taken as the number of classes.

    Returns:
        a scalar tensor for each k, on ``output``'s device; 0 for an empty batch.
    """
    if target.ndim == 2:
        target = target.argmax(dim=1)
    if len(target) == 0:
        return [output.new_zeros(()) for _ in topk]
    best = output.topk(min(max(topk), output.shape[1]), dim=1).indices
    hits = best == target[:, None]
    return [hits[:, :k].any(dim=1).float().mean() * 100 for k in topk]


def fit_targets(target: Tensor, classes: int) -> Tensor:
    """Widen mixed targets [N, K] to a head with more outputs (a 1000-way net on ten classes)."""
    if target.ndim == 1 or target.shape[1] >= classes:
        return target
    return torch.nn.functional.pad(target, (0, classes - target.shape[1]))


class Averages:
    """Weighted running means of named values, in float64, without waiting for the device.

    ``total`` and ``weight`` live on the device; reading (``means``) is what synchronises. They are part of a
    checkpoint, so that an epoch that was cut in two still reports its whole mean.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)

    def add(self, values: dict[str, Tensor | float], weight: int) -> None:
        """Count ``values`` (scalar tensors, or numbers, by name) ``weight`` times; a weight of 0 counts
        nothing.
        """
        if weight == 0:
            return
        scalars = [torch.as_tensor(values[name]).detach().to(self.sums) for name in self.names]
        row = torch.stack(scalars)
        self.sums[:-1] += row * weight
        self.sums[-1] += weight

    def means(self, reduce_sum: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means, over all ranks where ``reduce_sum`` is given (a collective call then)."""
        sums = self.sums if reduce_sum is None else reduce_sum(self.sums)
        values = sums.tolist()
        count = max(values[-1], 1.0)
        return {name: value / count for name, value in zip(self.names, values[:-1], strict=True)}

    def latest(self) -> dict[str, Tensor]:
        """This rank's means so far as tensors on the device, without waiting for it."""
        means = self.sums[:-1] / self.sums[-1].clamp(min=1)
        return dict(zip(self.names, means.unbind(), strict=True))

    def reset(self) -> None:
        """Start anew."""
        self.sums.zero_()

    def restore(self, state: list[float]) -> None:
        """Go on from ``sums.tolist()``."""
        self.sums.copy_(torch.tensor(state, dtype=torch.float64))
