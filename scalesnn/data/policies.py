"""Augmentation policies as tables and draws: which operations with which magnitudes, for each image.

The policies are torchvision's, with its spaces of operations and its probabilities: TrivialAugmentWide
(Müller and Hutter 2021), RandAugment (Cubuk et al. 2020: two operations, magnitude 9 of 31), AutoAugment
(Cubuk et al. 2019) for ImageNet, CIFAR-10 and SVHN, and AugMix (Hendrycks et al. 2020: severity 3, three
chains). Only the draws are here; what an operation does to pixels is in dali_operations.py and
torchvision_operations.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from scalesnn.base import UserError

__all__ = [
    "AUGMIX_CHAINS",
    "AUGMIX_DEPTH",
    "OPERATIONS",
    "POLICIES",
    "PolicyDraws",
    "draw_policy",
    "magnitudes_of",
    "numbers_needed",
    "stages_of",
]

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
    "Invert",
)
POLICIES = ("ta_wide", "ra", "imagenet", "cifar10", "svhn", "augmix")
_SIGNED = frozenset(
    ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
)
_PLAIN = frozenset(("Identity", "AutoContrast", "Equalize", "Invert"))  # operations without a magnitude

AUGMIX_CHAINS, AUGMIX_DEPTH, AUGMIX_SEVERITY = 3, 3, 3
RANDAUGMENT_STAGES, RANDAUGMENT_MAGNITUDE = 2, 9

# AutoAugment's sub-policies, two operations each: name, probability in tenths, magnitude's place in ten bins.
_IMAGENET = """
    Posterize 4 8 Rotate 6 9, Solarize 6 5 AutoContrast 6 -, Equalize 8 - Equalize 6 -, Posterize 6 7
    Posterize 6 6, Equalize 4 - Solarize 2 4, Equalize 4 - Rotate 8 8, Solarize 6 3 Equalize 6 -,
    Posterize 8 5 Equalize 10 -, Rotate 2 3 Solarize 6 8, Equalize 6 - Posterize 4 6, Rotate 8 8 Color 4
    0, Rotate 4 9 Equalize 6 -, Equalize 0 - Equalize 8 -, Invert 6 - Equalize 10 -, Color 6 4 Contrast 10
    8, Rotate 8 8 Color 10 2, Color 8 8 Solarize 8 7, Sharpness 4 7 Invert 6 -, ShearX 6 5 Equalize 10 -,
    Color 4 0 Equalize 6 -, Equalize 4 - Solarize 2 4, Solarize 6 5 AutoContrast 6 -, Invert 6 - Equalize
    10 -, Color 6 4 Contrast 10 8, Equalize 8 - Equalize 6 -"""
_CIFAR10 = """
    Invert 1 - Contrast 2 6, Rotate 7 2 TranslateX 3 9, Sharpness 8 1 Sharpness 9 3, ShearY 5 8 TranslateY
    7 9, AutoContrast 5 - Equalize 9 -, ShearY 2 7 Posterize 3 7, Color 4 3 Brightness 6 7, Sharpness 3 9
    Brightness 7 9, Equalize 6 - Equalize 5 -, Contrast 6 7 Sharpness 6 5, Color 7 7 TranslateX 5 8,
    Equalize 3 - AutoContrast 4 -, TranslateY 4 3 Sharpness 2 6, Brightness 9 6 Color 2 8, Solarize 5 2
    Invert 0 -, Equalize 2 - AutoContrast 6 -, Equalize 2 - Equalize 6 -, Color 9 9 Equalize 6 -,
    AutoContrast 8 - Solarize 2 8, Brightness 1 3 Color 7 0, Solarize 4 5 AutoContrast 9 -, TranslateY 9 9
    TranslateY 7 9, AutoContrast 9 - Solarize 8 3, Equalize 8 - Invert 1 -, TranslateY 7 9 AutoContrast 9
    -"""
_SVHN = """
    ShearX 9 4 Invert 2 -, ShearY 9 8 Invert 7 -, Equalize 6 - Solarize 6 6, Invert 9 - Equalize 6 -,
    Equalize 6 - Rotate 9 3, ShearX 9 4 AutoContrast 8 -, ShearY 9 8 Invert 4 -, ShearY 9 5 Solarize 2 6,
    Invert 9 - AutoContrast 8 -, Equalize 6 - Rotate 9 3, ShearX 9 4 Solarize 3 3, ShearY 8 8 Invert 7 -,
    Equalize 9 - TranslateY 6 6, Invert 9 - Equalize 6 -, Contrast 3 3 Rotate 8 4, Invert 8 - TranslateY 0
    2, ShearY 7 6 Solarize 4 8, Invert 6 - Rotate 8 4, ShearY 3 7 TranslateX 9 3, ShearX 1 6 Invert 6 -,
    Solarize 7 2 TranslateY 6 7, ShearY 8 4 Invert 8 -, ShearX 7 9 TranslateY 8 3, ShearY 8 5 AutoContrast
    7 -, ShearX 7 2 Invert 1 -"""


@dataclass(frozen=True)
class PolicyDraws:
    """What a policy does to each of n images, stage after stage.

    Attributes:
        operations: int64 [n, stages], places in OPERATIONS.
        magnitudes: float64 [n, stages], with their sign.
        weights: AugMix only, float64 [n, 1 + chains]: the share of the untouched image and of each chain's
            result. The stages of chain c are then c * AUGMIX_DEPTH … (c + 1) * AUGMIX_DEPTH - 1.
    """

    operations: np.ndarray
    magnitudes: np.ndarray
    weights: np.ndarray | None = None


def stages_of(policy: str) -> int:
    """How many operations follow each other (AugMix: in all its chains together); 0 for ``none``.

    Raises:
        UserError: no such policy.
    """
    if policy == "none":
        return 0
    if policy == "ta_wide":
        return 1
    if policy == "augmix":
        return AUGMIX_CHAINS * AUGMIX_DEPTH
    if policy in POLICIES:
        return 2
    raise UserError(f"--auto-augment must be one of none, {', '.join(POLICIES)}, got {policy!r}")


@functools.cache
def _space(policy: str, size: int) -> tuple[list[int], np.ndarray]:
    """A policy's operations and the magnitudes of its bins: places in OPERATIONS, float64 [len(OPERATIONS),
    bins].

    Magnitudes are computed in float32 like torchvision's, because some are rounded down to integers later.
    """
    if policy == "ta_wide":
        bins, shear, rotate, strength, depth, first_depth = 31, 0.99, 135.0, 0.99, 6, 8
        shift = 32.0
    elif policy == "augmix":
        bins, shear, rotate, strength, depth, first_depth = 10, 0.3, 30.0, 0.9, 4, 4
        shift = size / 3.0
    else:
        bins, shear, rotate, strength, depth, first_depth = (
            (31 if policy == "ra" else 10),
            0.3,
            30.0,
            0.9,
            4,
            8,
        )
        shift = 150.0 / 331.0 * size
    ends = {"ShearX": shear, "ShearY": shear, "TranslateX": shift, "TranslateY": shift, "Rotate": rotate}
    ends |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), strength)
    magnitudes = torch.zeros(len(OPERATIONS), bins)
    for place, name in enumerate(OPERATIONS):
        if name in ends:
            magnitudes[place] = torch.linspace(0.0, ends[name], bins)
        elif name == "Posterize":
            magnitudes[place] = first_depth - (torch.arange(bins) / ((bins - 1) / depth)).round()
        elif name == "Solarize":
            magnitudes[place] = torch.linspace(255.0, 0.0, bins)
    left_out = {"augmix": ("Identity", "Invert")}.get(policy, ("Invert",))
    members = [place for place, name in enumerate(OPERATIONS) if name not in left_out]
    return members, magnitudes.double().numpy()


def magnitudes_of(policy: str, place: int, size: int) -> list[float]:
    """Every magnitude that ``policy`` can draw for the operation OPERATIONS[place], without repetition."""
    name = OPERATIONS[place]
    if name in _PLAIN:
        return [0.0]
    found = {float(value) for value in _space(policy, size)[1][place]}
    if name in _SIGNED:
        found |= {-value for value in found}
    return sorted(found)


_IS_SIGNED = np.array([name in _SIGNED for name in OPERATIONS])
_HAS_MAGNITUDE = np.array([name not in _PLAIN for name in OPERATIONS])


def _signed(operations: np.ndarray, magnitudes: np.ndarray, coin: np.ndarray) -> np.ndarray:
    """The magnitudes, negative where the operation has a sign and ``coin`` falls below one half."""
    magnitudes = np.where(_HAS_MAGNITUDE[operations], magnitudes, 0.0)
    return np.where(_IS_SIGNED[operations] & (coin < 0.5), -magnitudes, magnitudes)


def _sub_policies(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operations, probabilities and bins [25, 2] of one of AutoAugment's tables."""
    rows = [entry.split() for entry in text.split(",")]
    cells = np.array([[row[:3], row[3:]] for row in rows])
    operations = np.vectorize(OPERATIONS.index)(cells[:, :, 0])
    bins = np.where(cells[:, :, 2] == "-", "0", cells[:, :, 2]).astype(np.int64)
    return operations, cells[:, :, 1].astype(np.int64) / 10.0, bins


def numbers_needed(policy: str) -> int:
    """How many uniform numbers ``draw_policy`` takes for an image."""
    return {
        "none": 0,
        "ta_wide": 3,
        "ra": 2 * RANDAUGMENT_STAGES,
        "augmix": 5 + AUGMIX_CHAINS * (1 + 3 * AUGMIX_DEPTH),
    }.get(policy, 5)


def draw_policy(policy: str, size: int, numbers: np.ndarray) -> PolicyDraws:
    """Turn uniform numbers into operations and magnitudes.

    Args:
        policy: one of POLICIES.
        size: height and width of the (square) image that the policy sees.
        numbers: float64 [n, numbers_needed(policy)] in [0, 1).
    """
    members, magnitudes = _space(policy, size)
    bins = magnitudes.shape[1]
    members_array = np.array(members)
    if policy == "ta_wide":
        operations = members_array[(numbers[:, :1] * len(members)).astype(np.int64)]
        chosen = magnitudes[operations, (numbers[:, 1:2] * bins).astype(np.int64)]
        return PolicyDraws(operations, _signed(operations, chosen, numbers[:, 2:3]))
    if policy == "ra":
        operations = members_array[(numbers[:, 0::2] * len(members)).astype(np.int64)]
        return PolicyDraws(
            operations, _signed(operations, magnitudes[operations, RANDAUGMENT_MAGNITUDE], numbers[:, 1::2])
        )
    if policy == "augmix":
        return _draw_augmix(members_array, magnitudes, numbers)
    table, probabilities, places = _sub_policies(
        {"imagenet": _IMAGENET, "cifar10": _CIFAR10, "svhn": _SVHN}[policy]
    )
    row = (numbers[:, 0] * len(table)).astype(np.int64)
    operations = np.where(numbers[:, 1:3] <= probabilities[row], table[row], 0)
    return PolicyDraws(operations, _signed(operations, magnitudes[operations, places[row]], numbers[:, 3:5]))


def _draw_augmix(members: np.ndarray, magnitudes: np.ndarray, numbers: np.ndarray) -> PolicyDraws:
    """AugMix: Dirichlet weights (all parameters 1, so normalised exponentials) and three chains of depth 1 to
    3."""
    exponentials = -np.log1p(-numbers[:, :5])
    blend = exponentials[:, :2] / exponentials[:, :2].sum(axis=1, keepdims=True)
    chains = exponentials[:, 2:5] / exponentials[:, 2:5].sum(axis=1, keepdims=True)
    weights = np.concatenate((blend[:, :1], chains * blend[:, 1:]), axis=1)
    rest = numbers[:, 5:].reshape(len(numbers), AUGMIX_CHAINS, 1 + 3 * AUGMIX_DEPTH)
    depth = 1 + (rest[:, :, 0] * AUGMIX_DEPTH).astype(np.int64)
    steps = rest[:, :, 1:].reshape(len(numbers), AUGMIX_CHAINS, AUGMIX_DEPTH, 3)
    operations = members[(steps[..., 0] * len(members)).astype(np.int64)]
    chosen = magnitudes[operations, (steps[..., 1] * AUGMIX_SEVERITY).astype(np.int64)]
    chosen = _signed(operations, chosen, steps[..., 2])
    runs = np.arange(AUGMIX_DEPTH) < depth[:, :, None]
    stages = AUGMIX_CHAINS * AUGMIX_DEPTH
    return PolicyDraws(
        np.where(runs, operations, 0).reshape(-1, stages),
        np.where(runs, chosen, 0.0).reshape(-1, stages),
        weights,
    )
