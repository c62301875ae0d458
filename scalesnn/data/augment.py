"""The recipe of a training image, and every random choice of it, drawn without state.

Geometry follows torchvision's RandomResizedCrop, Resize, CenterCrop and RandomErasing, rounding included, so
that the DALI and the torchvision loader cut the same windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from scalesnn.data.policies import PolicyDraws, draw_policy, numbers_needed
from scalesnn.data.sampling import BatchKeys, Purpose, uniforms

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Recipe",
    "TrainDraws",
    "centre_crop",
    "draw_erase",
    "draw_train",
    "resized_size",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_ATTEMPTS = 10
_ASPECT = (3.0 / 4.0, 4.0 / 3.0)
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (0.3, 3.3)


@dataclass(frozen=True)
class Recipe:
    """What happens to an image.

    Attributes:
        train_crop_size, val_resize_size, val_crop_size: pixels.
        minimum_area: the smallest share of the image's area that a random crop takes; the largest is 1.
        interpolation: nearest, bilinear or bicubic.
        policy: none, or one of policies.POLICIES.
        erase: probability of random erasing.
        flip: probability of a horizontal flip.
        mean, std: of the normalisation, for pixels in 0 … 1.
    """

    train_crop_size: int = 176
    val_resize_size: int = 232
    val_crop_size: int = 224
    minimum_area: float = 0.08
    interpolation: str = "bilinear"
    policy: str = "ta_wide"
    erase: float = 0.1
    flip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class TrainDraws:
    """The random choices for n images.

    Attributes:
        crop: int64 [n, 4]: top, left, height, width of the window that is resized to the training size.
        flip: bool [n].
        policy: operations and magnitudes, or None without a policy.
        erase: int64 [n, 4]: top, left, height, width of the erased rectangle; height 0 where nothing is
            erased.
    """

    crop: np.ndarray
    flip: np.ndarray
    policy: PolicyDraws | None
    erase: np.ndarray


def draw_train(recipe: Recipe, seed: int, epoch: int, keys: BatchKeys, sizes: np.ndarray) -> TrainDraws:
    """Draw everything that ``recipe`` leaves to chance.

    Args:
        recipe: the recipe.
        seed, epoch: of the run.
        keys: the images and copies.
        sizes: int64 [n, 2], height and width of each stored image.
    """

    def numbers(purpose: Purpose, count: int) -> np.ndarray:
        return uniforms(seed, epoch, purpose, keys.images, keys.copies, count)

    crop_numbers = numbers(Purpose.CROP, 2 * _ATTEMPTS + 3)
    crop = _random_crop(sizes, crop_numbers, recipe.minimum_area)
    flip = crop_numbers[:, 2 * _ATTEMPTS + 2] < recipe.flip
    policy = None
    if recipe.policy != "none":
        count = numbers_needed(recipe.policy)
        policy = draw_policy(recipe.policy, recipe.train_crop_size, numbers(Purpose.POLICY, count))
    size = (recipe.train_crop_size, recipe.train_crop_size)
    return TrainDraws(crop, flip, policy, draw_erase(recipe.erase, size, seed, epoch, keys))


def draw_erase(
    probability: float, size: tuple[int, int], seed: int, epoch: int, keys: BatchKeys
) -> np.ndarray:
    """Rectangles to erase in images of ``size``: int64 [n, 4], top, left, height, width; zeros for none."""
    if probability <= 0:
        return np.zeros((len(keys), 4), np.int64)
    numbers = uniforms(seed, epoch, Purpose.ERASE, keys.images, keys.copies, 2 * _ATTEMPTS + 3)
    area = np.full(len(keys), float(size[0] * size[1]))
    heights, widths = _first_fit(area, numbers, _ERASED_AREA, _ERASED_ASPECT)
    fits = (heights < size[0]) & (widths < size[1])
    rows, first = np.arange(len(keys)), fits.argmax(axis=1)
    height, width = heights[rows, first], widths[rows, first]
    top = np.floor(numbers[:, 20] * (size[0] - height + 1))
    left = np.floor(numbers[:, 21] * (size[1] - width + 1))
    chosen = fits.any(axis=1) & (numbers[:, 22] < probability) & (height > 0) & (width > 0)
    return np.where(chosen[:, None], np.stack((top, left, height, width), axis=1), 0.0).astype(np.int64)


def _first_fit(
    area: np.ndarray, numbers: np.ndarray, share: tuple[float, float], aspect: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n, attempts] each: sqrt(area · aspect) and sqrt(area / aspect), rounded half to even, per
    attempt."""
    target = area[:, None] * (share[0] + numbers[:, 0:20:2] * (share[1] - share[0]))
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = np.exp(low + numbers[:, 1:20:2] * (high - low))
    return np.rint(np.sqrt(target * ratio)), np.rint(np.sqrt(target / ratio))


def _random_crop(sizes: np.ndarray, numbers: np.ndarray, minimum_area: float) -> np.ndarray:
    """RandomResizedCrop's windows, int64 [n, 4]; the first of ten attempts that fits, else the middle of the
    image."""
    height, width = sizes[:, 0], sizes[:, 1]
    area = (height * width).astype(np.float64)
    widths, heights = _first_fit(area, numbers, (minimum_area, 1.0), _ASPECT)
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
    found = fits.any(axis=1)
    crop_height, crop_width = heights[rows, first], widths[rows, first]
    # None of the ten fits: the largest window in the middle whose shape is allowed.
    shape = width / height
    middle_width = np.where(shape > _ASPECT[1], np.rint(height * _ASPECT[1]), width)
    middle_height = np.where(shape < _ASPECT[0], np.rint(width / _ASPECT[0]), height)
    top = np.floor(numbers[:, 20] * (height - crop_height + 1))
    left = np.floor(numbers[:, 21] * (width - crop_width + 1))
    crop = np.stack(
        (
            np.where(found, top, (height - middle_height) // 2),
            np.where(found, left, (width - middle_width) // 2),
            np.where(found, crop_height, middle_height),
            np.where(found, crop_width, middle_width),
        ),
        axis=1,
    )
    return crop.astype(np.int64)


def resized_size(sizes: np.ndarray, shorter: int) -> np.ndarray:
    """Sizes after torchvision's Resize(shorter): the longer side is rounded down. int64 [n, 2]."""
    smallest = sizes.min(axis=1, keepdims=True)
    return np.where(sizes == smallest, shorter, (shorter * sizes) // smallest)


def centre_crop(sizes: np.ndarray, crop: int) -> np.ndarray:
    """Top and left of torchvision's CenterCrop: half the margin, rounded half to even. int64 [n, 2].

    Negative where the image is smaller than the crop, which is then padded with zeros: there torchvision pads
    half the missing pixels, rounded down, on the top and left.
    """
    margin = sizes - crop
    return np.where(margin >= 0, np.rint(margin / 2.0), -((-margin) // 2)).astype(np.int64)
