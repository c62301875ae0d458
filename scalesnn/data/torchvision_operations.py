"""The policies' operations on Pillow images, through torchvision's functions."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from scalesnn.data.policies import AUGMIX_CHAINS, AUGMIX_DEPTH, OPERATIONS, PolicyDraws

__all__ = ["apply_operation", "apply_policy"]


def apply_operation(
    picture: Image.Image, name: str, magnitude: float, mode: InterpolationMode
) -> Image.Image:
    """One operation of policies.OPERATIONS; what it leaves uncovered is black."""
    if name in ("ShearX", "ShearY"):
        degrees = math.degrees(math.atan(magnitude))
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        return F.affine(picture, 0.0, [0, 0], 1.0, shear, interpolation=mode, center=[0, 0])
    if name in ("TranslateX", "TranslateY"):
        shift = [int(magnitude), 0] if name == "TranslateX" else [0, int(magnitude)]
        return F.affine(picture, 0.0, shift, 1.0, [0.0, 0.0], interpolation=mode)
    if name == "Rotate":
        return F.rotate(picture, magnitude, interpolation=mode)
    if name == "Posterize":
        return F.posterize(picture, int(magnitude))
    if name == "Solarize":
        return F.solarize(picture, magnitude)
    plain = {
        "Identity": lambda same: same,
        "AutoContrast": F.autocontrast,
        "Equalize": F.equalize,
        "Invert": F.invert,
    }
    if name in plain:
        return plain[name](picture)
    adjust = {
        "Brightness": F.adjust_brightness,
        "Color": F.adjust_saturation,
        "Contrast": F.adjust_contrast,
        "Sharpness": F.adjust_sharpness,
    }
    return adjust[name](picture, 1.0 + magnitude)


def _chain(
    picture: Image.Image, operations: np.ndarray, magnitudes: np.ndarray, mode: InterpolationMode
) -> Image.Image:
    for place, magnitude in zip(operations.tolist(), magnitudes.tolist(), strict=True):
        picture = apply_operation(picture, OPERATIONS[place], magnitude, mode)
    return picture


def apply_policy(picture: Image.Image, draws: PolicyDraws, mode: InterpolationMode) -> Image.Image:
    """Apply the first image's draws to ``picture``."""
    operations, magnitudes = draws.operations[0], draws.magnitudes[0]
    if draws.weights is None:
        return _chain(picture, operations, magnitudes, mode)
    weights = draws.weights[0]
    mixed = weights[0] * np.asarray(picture, np.float32)
    for chain in range(AUGMIX_CHAINS):
        steps = slice(chain * AUGMIX_DEPTH, (chain + 1) * AUGMIX_DEPTH)
        result = _chain(picture, operations[steps], magnitudes[steps], mode)
        mixed = mixed + weights[1 + chain] * np.asarray(result, np.float32)
    return Image.fromarray(mixed.astype(np.uint8))
