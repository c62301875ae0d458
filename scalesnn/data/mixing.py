"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) on a batch that lies on its device.

As in torchvision's recipe, where both are on each is taken half of the time. The choice and the ratio belong
to a pair of images and are drawn from (seed, epoch, the pair's position), so they do not depend on ranks;
each of the two images is mixed with the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scalesnn.data.sampling import BatchKeys, Purpose, uniforms
from scalesnn.data.transfer import to_device

__all__ = ["MixDraws", "Mixer", "draw_mix"]


@dataclass(frozen=True)
class MixDraws:
    """How each of n images is mixed with its partner.

    Attributes:
        partner: int64 [n], places in the batch.
        box: int64 [n, 4]: top, bottom, left, right of the window that comes from the partner (CutMix); empty
            for mixup.
        share: float64 [n]: the weight of the image's own target, and with mixup of its own pixels.
        pixels: float64 [n]: the weight of the image's own pixels outside the box (1 with CutMix).
    """

    partner: np.ndarray
    box: np.ndarray
    share: np.ndarray
    pixels: np.ndarray


def _beta(alpha: float, numbers: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) by its inverse cumulative distribution: one uniform number each, so no rejected
    draws."""
    if alpha == 1.0:
        return numbers
    grid, cumulative = _beta_table(alpha)
    return np.interp(numbers, cumulative, grid)


@functools.cache
def _beta_table(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Points x and the cumulative distribution there, dense towards both ends.

    With x = sin²(θ), the density x^(a-1) (1-x)^(a-1) dx becomes 2 (sin θ cos θ)^(2a-1) dθ. It is symmetric
    about π/4. The half 0 … π/4 is cut at θ = π/4 · (i/n)^k with k = max(1, 1/a), which makes the integrand
    bounded near 0.
    """
    power = max(1.0, 1.0 / alpha)
    points = np.linspace(0.0, 1.0, 20_001)
    middles = (points[:-1] + points[1:]) / 2
    theta = np.pi / 4 * middles**power
    weight = (np.sin(theta) * np.cos(theta)) ** (2 * alpha - 1) * power * middles ** (power - 1)
    half = np.concatenate(([0.0], np.cumsum(weight)))
    half = half / half[-1] / 2
    edges = np.sin(np.pi / 4 * points**power) ** 2
    return np.concatenate((edges, 1 - edges[-2::-1])), np.concatenate((half, 1 - half[-2::-1]))


def draw_mix(
    seed: int, epoch: int, keys: BatchKeys, size: tuple[int, int], mixup_alpha: float, cutmix_alpha: float
) -> MixDraws:
    """Draw the mixing of one rank's batch; a lone image is left as it is.

    Args:
        seed, epoch: of the run.
        keys: the batch, as TrainOrder.rank_batch gave it.
        size: height and width of the images.
        mixup_alpha, cutmix_alpha: parameters of the Beta distributions; 0 switches one off, not both.
    """
    count = len(keys)
    numbers = uniforms(seed, epoch, Purpose.MIX, keys.pairs & 0xFFFFFFFF, keys.pairs >> 32, 4)
    partner = np.roll(np.arange(count), count // 2)
    if mixup_alpha > 0 and cutmix_alpha > 0:
        cut = numbers[:, 0] < 0.5
    else:
        cut = np.full(count, cutmix_alpha > 0)
    share = np.ones(count)
    if mixup_alpha > 0:
        share = np.where(cut, share, _beta(mixup_alpha, numbers[:, 1]))
    pixels = share
    box = np.zeros((count, 4), np.int64)
    if cutmix_alpha > 0:
        height, width = size
        half = 0.5 * np.sqrt(1.0 - _beta(cutmix_alpha, numbers[:, 1]))
        row, column = np.floor(numbers[:, 2] * height), np.floor(numbers[:, 3] * width)
        half_height, half_width = np.floor(half * height), np.floor(half * width)
        cuts = np.stack(
            (
                np.maximum(row - half_height, 0),
                np.minimum(row + half_height, height),
                np.maximum(column - half_width, 0),
                np.minimum(column + half_width, width),
            ),
            axis=1,
        ).astype(np.int64)
        kept = 1.0 - (cuts[:, 1] - cuts[:, 0]) * (cuts[:, 3] - cuts[:, 2]) / (height * width)
        box = np.where(cut[:, None], cuts, box)
        share = np.where(cut, kept, share)
        pixels = np.where(cut, 1.0, pixels)
    if count < 2:
        return MixDraws(partner, np.zeros_like(box), np.ones(count), np.ones(count))
    return MixDraws(partner, box, share, pixels)


class Mixer:
    """Mixes batches.

    Args:
        seed: the run's seed.
        classes: number of classes, the width of the targets.
        mixup_alpha, cutmix_alpha: see draw_mix.
    """

    def __init__(self, seed: int, classes: int, mixup_alpha: float, cutmix_alpha: float) -> None:
        self.seed, self.classes = seed, classes
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, keys: BatchKeys) -> tuple[Tensor, Tensor]:
        """Mix ``images`` [n, …, H, W] with their partners.

        Returns:
            the mixed images, and the targets as float32 [n, classes] that sum to 1.
        """
        height, width = images.shape[-2:]
        draws = draw_mix(self.seed, epoch, keys, (height, width), self.mixup_alpha, self.cutmix_alpha)
        device = images.device
        drawn = np.column_stack((draws.partner, draws.box, draws.share, draws.pixels))  # float64: one copy
        columns = to_device(torch.from_numpy(drawn), device)
        partner, box = columns[:, 0].long(), columns[:, 1:5].long()
        one_hot = torch.nn.functional.one_hot(labels, self.classes).float()
        share = columns[:, 5, None].float()
        targets = one_hot * share + one_hot[partner] * (1 - share)
        ones = (1,) * (images.dim() - 1)
        own = columns[:, 6].to(images.dtype).reshape(-1, *ones)
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        in_rows = (rows >= box[:, :1]) & (rows < box[:, 1:2])
        in_columns = (columns >= box[:, 2:3]) & (columns < box[:, 3:])
        inside = (in_rows[:, :, None] & in_columns[:, None, :]).reshape(-1, *ones[2:], height, width)
        other = images[partner]
        mixed = torch.where(inside, other, torch.lerp(other, images, own))
        if images.dim() == 4:
            mixed = mixed.contiguous(memory_format=torch.channels_last)
        return mixed, targets
