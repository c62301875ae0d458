"""The policies' operations as DALI operators, as close to Pillow's results as DALI allows.

For each stage of a policy an image belongs to one group (a branch of the graph), and its parameters come in
as inputs. Distances from torchvision with Pillow, mean of 0 … 255: none for identity, translation,
brightness, posterise, solarise and invert; below 0.7 for the others, but 2.1 for equalise, which DALI
computes by another formula. Measured in tests/data/test_data_parity.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from scalesnn.data.augment import Recipe
from scalesnn.data.policies import (
    AUGMIX_CHAINS,
    AUGMIX_DEPTH,
    OPERATIONS,
    PolicyDraws,
    magnitudes_of,
    stages_of,
)

__all__ = ["apply_policy", "policy_inputs"]

# Branches of the graph. Operations that only map each value to another share one branch, a table.
_IDENTITY, _WARP, _SHIFT, _TABLE, _COLOR, _CONTRAST, _SHARPNESS, _EQUALIZE, _AUTOCONTRAST = range(9)
_GROUP = {
    "Identity": _IDENTITY,
    "ShearX": _WARP,
    "ShearY": _WARP,
    "TranslateX": _SHIFT,
    "TranslateY": _SHIFT,
    "Rotate": _WARP,
    "Brightness": _TABLE,
    "Color": _COLOR,
    "Contrast": _CONTRAST,
    "Sharpness": _SHARPNESS,
    "Posterize": _TABLE,
    "Solarize": _TABLE,
    "AutoContrast": _AUTOCONTRAST,
    "Equalize": _EQUALIZE,
    "Invert": _TABLE,
}
_GROUPS = np.array([_GROUP[name] for name in OPERATIONS])
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's SMOOTH
_ONE_PIXEL = np.array([[0, 0, 1], [0, 0, 1]])
_CENTRE = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)


def _table(name: str, magnitude: float) -> np.ndarray:
    """uint8 [256]: what an operation makes of each value, in Pillow's arithmetic."""
    values = np.arange(256)
    if name == "Brightness":
        scaled = np.float32(1.0 + magnitude) * values.astype(np.float32)
        return np.clip(scaled, 0, 255).astype(np.uint8)
    if name == "Posterize":
        return (values & ~(2 ** (8 - int(magnitude)) - 1)).astype(np.uint8)
    if name == "Solarize":
        return np.where(values < magnitude, values, 255 - values).astype(np.uint8)
    return (255 - values).astype(np.uint8)


@functools.cache
def _tables(recipe: Recipe) -> tuple[dict[tuple[int, float], int], np.ndarray]:
    """The number of each (operation, magnitude) that a table serves, and all tables one after the other."""
    numbers: dict[tuple[int, float], int] = {}
    tables: list[np.ndarray] = []
    for place, name in enumerate(OPERATIONS):
        if _GROUP[name] == _TABLE:
            for magnitude in magnitudes_of(recipe.policy, place, recipe.train_crop_size):
                numbers[place, magnitude] = len(tables)
                tables.append(_table(name, magnitude))
    return numbers, np.concatenate(tables) if tables else np.zeros(256, np.uint8)


def _matrix(name: str, magnitude: float, size: int) -> list[list[float]]:
    """From places in the result to places in the image, both in pixels from the outer corner."""
    if name == "ShearX":
        return [[1, magnitude, 0], [0, 1, 0]]
    if name == "ShearY":
        return [[1, 0, 0], [magnitude, 1, 0]]
    angle = -math.radians(magnitude)
    cosine, sine, middle = math.cos(angle), math.sin(angle), size / 2
    return [
        [cosine, sine, middle - (cosine + sine) * middle],
        [-sine, cosine, middle - (cosine - sine) * middle],
    ]


def policy_inputs(draws: PolicyDraws, recipe: Recipe) -> dict[str, np.ndarray]:
    """What ``apply_policy`` takes: name → [n, stages, …]."""
    count, stages = draws.operations.shape
    size = recipe.train_crop_size
    groups = _GROUPS[draws.operations]
    inputs = {
        "group": groups.astype(np.int32),
        "matrix": np.tile(np.array([[1, 0, 1], [0, 1, 1]], np.float32), (count, stages, 1, 1)),
        "shift": np.zeros((count, stages, 2), np.int32),
        "table": np.zeros((count, stages), np.uint16),
        "factor": (1.0 + draws.magnitudes).astype(np.float32),
        "kernel": np.tile(_CENTRE, (count, stages, 1, 1)),
    }
    if draws.weights is not None:
        inputs["weight"] = draws.weights.astype(np.float32)
    numbers, _ = _tables(recipe)
    for row, stage in np.argwhere(np.isin(groups, (_WARP, _SHIFT, _TABLE, _SHARPNESS))).tolist():
        place, magnitude = int(draws.operations[row, stage]), float(draws.magnitudes[row, stage])
        name = OPERATIONS[place]
        if _GROUP[name] == _WARP:  # the image is padded by one pixel
            inputs["matrix"][row, stage] = np.array(_matrix(name, magnitude, size)) + _ONE_PIXEL
        elif _GROUP[name] == _SHIFT:
            inputs["shift"][row, stage, 1 if name == "TranslateX" else 0] = -int(magnitude)
        elif _GROUP[name] == _SHARPNESS:
            inputs["kernel"][row, stage] = (1.0 + magnitude) * _CENTRE - magnitude * _SMOOTH
        else:
            inputs["table"][row, stage] = 256 * numbers[place, magnitude]
    return inputs


def apply_policy(image: Any, recipe: Recipe, device: torch.device) -> Any:
    """Add a policy to a graph: uint8 images [size, size, 3] → the same. Called while a pipeline is
    defined."""
    from scalesnn.data.dali_graph import dali

    fn, types = dali()
    size = recipe.train_crop_size
    stages = stages_of(recipe.policy)
    _, tables = _tables(recipe)
    nearest = recipe.interpolation == "nearest"
    interpolation = types.DALIInterpType.INTERP_NN if nearest else types.DALIInterpType.INTERP_LINEAR
    group = fn.external_source(name="group", dtype=types.INT32, ndim=1)
    matrix = fn.external_source(name="matrix", dtype=types.FLOAT, ndim=3)
    shift = fn.external_source(name="shift", dtype=types.INT32, ndim=2)
    table = fn.external_source(name="table", dtype=types.UINT16, ndim=1)
    factor = fn.external_source(name="factor", dtype=types.FLOAT, ndim=1)
    kernel = fn.external_source(name="kernel", dtype=types.FLOAT, ndim=3)
    whole = np.array([size, size], np.int32)

    def cut(picture: Any, anchor: Any, shape: Any) -> Any:
        """A window that may reach over the border, black there."""
        return fn.slice(
            picture,
            anchor,
            shape,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=0,
        )

    def beside(values: Any) -> Any:
        """Values on the images' device, where they are operands and not arguments."""
        return values.gpu() if device.type == "cuda" else values

    def truncated(picture: Any) -> Any:
        """float → uint8, rounded down as Pillow and torch do; DALI's cast rounds to the nearest."""
        return fn.cast(picture - 0.4995, dtype=types.UINT8)

    def stage(picture: Any, number: int) -> Any:
        kind = group[number]
        if kind == _WARP:
            padded = cut(picture, np.array([-1, -1], np.int32), whole + 2)
            result = fn.warp_affine(
                padded,
                matrix=matrix[number],
                size=[float(size), float(size)],
                inverse_map=True,
                interp_type=interpolation,
            )
        elif kind == _SHIFT:
            result = cut(picture, shift[number], whole)
        elif kind == _TABLE:
            keys = fn.cast(picture, dtype=types.UINT16) + beside(table[number])
            result = fn.lookup_table(
                keys, keys=np.arange(len(tables)).tolist(), values=tables.tolist(), dtype=types.UINT8
            )
        elif kind == _COLOR:
            result = fn.saturation(picture, saturation=factor[number])
        elif kind == _CONTRAST:
            grey = fn.color_space_conversion(
                picture, image_type=types.DALIImageType.RGB, output_type=types.DALIImageType.GRAY
            )
            middle = fn.cast(fn.reductions.mean(grey), dtype=types.INT32)
            result = fn.brightness_contrast(
                picture, contrast=factor[number], contrast_center=fn.cast(middle, dtype=types.FLOAT).cpu()
            )
        elif kind == _SHARPNESS:
            result = fn.filter(picture, beside(kernel[number]), dtype=types.UINT8)
        elif kind == _EQUALIZE:
            result = fn.equalize(picture)
        elif kind == _AUTOCONTRAST:
            low = fn.cast(fn.reductions.min(picture, axes=[0, 1]), dtype=types.FLOAT)
            high = fn.cast(fn.reductions.max(picture, axes=[0, 1]), dtype=types.FLOAT)
            flat = fn.cast(high == low, dtype=types.FLOAT)  # a channel of one value stays as it is
            scale = 255.0 / (high - low + 255.0 * flat)
            result = truncated((picture - low * (1.0 - flat)) * scale)
        else:
            result = picture
        return result

    if recipe.policy != "augmix":
        for number in range(stages):
            image = stage(image, number)
        return image
    weight = fn.external_source(name="weight", dtype=types.FLOAT, ndim=1)
    mixed = image * beside(weight[0])
    for chain in range(AUGMIX_CHAINS):
        result = image
        for depth in range(AUGMIX_DEPTH):
            result = stage(result, chain * AUGMIX_DEPTH + depth)
        mixed = mixed + result * beside(weight[1 + chain])
    return truncated(mixed)
