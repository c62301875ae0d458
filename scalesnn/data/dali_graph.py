"""The DALI graphs: from a file's bytes and its drawn parameters to a normalised image.

No operator of these graphs draws a random number: every choice comes in as an input, so the pixels do not
depend on the batch, the order, the threads or what ran before. The same graph runs on the CPU and on a GPU
('mixed' decoding, the rest on the device). DALI is imported when a graph is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from scalesnn.data.augment import Recipe, TrainDraws, centre_crop, resized_size
from scalesnn.data.policies import stages_of

__all__ = [
    "dali",
    "decoder_of",
    "evaluation_inputs",
    "make_evaluation_pipeline",
    "make_train_pipeline",
    "train_inputs",
]


def dali() -> tuple[Any, Any]:
    """DALI's operators and types, imported at the first call."""
    from nvidia.dali import fn, types

    return fn, types


def _interpolation(recipe: Recipe) -> dict[str, Any]:
    _, types = dali()
    kind = {
        "nearest": types.DALIInterpType.INTERP_NN,
        "bilinear": types.DALIInterpType.INTERP_LINEAR,
        "bicubic": types.DALIInterpType.INTERP_CUBIC,
    }[recipe.interpolation]
    return {"interp_type": kind, "antialias": recipe.interpolation != "nearest"}


def _normalisation(recipe: Recipe, half: bool) -> dict[str, Any]:
    _, types = dali()
    return {
        "mean": [255.0 * value for value in recipe.mean],
        "std": [255.0 * value for value in recipe.std],
        "output_layout": "HWC",
        "dtype": types.FLOAT16 if half else types.FLOAT,
    }


def _pipeline(
    graph: Callable[[], Any],
    batch_size: int,
    threads: int,
    device: torch.device,
    depth: int,
    conditionals: bool = False,
) -> Any:  # nvidia.dali.Pipeline
    """Build ``graph``. With ``conditionals`` DALI rewrites its code first, which takes seconds."""
    from nvidia.dali import pipeline_def

    made = pipeline_def(enable_conditionals=conditionals)(graph)(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=depth,
        exec_dynamic=True,
    )
    made.build()
    return made


def decoder_of(device: torch.device) -> str:
    """The decoders' backend: on a GPU they take bytes from the CPU."""
    return "mixed" if device.type == "cuda" else "cpu"


def make_train_pipeline(
    recipe: Recipe, batch_size: int, threads: int, device: torch.device, depth: int, half: bool
) -> Any:
    """The training graph; its inputs are those of ``train_inputs``, its output is [n, size, size, 3].

    Args:
        recipe: the recipe.
        batch_size: the largest batch.
        threads: CPU threads.
        device: CPU or CUDA.
        depth: how many batches run at once.
        half: output in float16 instead of float32.
    """
    fn, types = dali()
    stages = stages_of(recipe.policy)

    def graph() -> Any:
        raw = fn.external_source(name="raw", dtype=types.UINT8, ndim=1)
        window = fn.external_source(name="window", dtype=types.INT32, ndim=1)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        image = fn.decoders.image_slice(
            raw,
            device=decoder_of(device),
            start=window[0:2],
            shape=window[2:4],
            axis_names="HW",
            adjust_orientation=False,
        )
        image = fn.resize(image, size=size, **_interpolation(recipe))
        if stages > 0:
            from scalesnn.data.dali_operations import apply_policy

            image = apply_policy(image, recipe, device)
        image = fn.crop_mirror_normalize(image, **_normalisation(recipe, half))
        if recipe.erase > 0:
            rectangle = fn.external_source(name="erase", dtype=types.FLOAT, ndim=1)
            image = fn.erase(
                image, anchor=rectangle[0:2], shape=rectangle[2:4], axis_names="HW", fill_value=0
            )
        return image

    return _pipeline(graph, batch_size, threads, device, depth, conditionals=stages > 0)


def train_inputs(recipe: Recipe, draws: TrainDraws) -> dict[str, np.ndarray]:
    """What the training graph takes besides the bytes: name → [n, …]."""
    count = len(draws.flip)
    size = np.full((count, 2), float(recipe.train_crop_size), np.float32)
    size[draws.flip, 1] *= -1  # a negative width is a flip
    inputs = {"window": draws.crop.astype(np.int32), "size": size}
    if recipe.erase > 0:
        inputs["erase"] = draws.erase.astype(np.float32)
    if draws.policy is not None:
        from scalesnn.data.dali_operations import policy_inputs

        inputs |= policy_inputs(draws.policy, recipe)
    return inputs


def make_evaluation_pipeline(
    recipe: Recipe, batch_size: int, threads: int, device: torch.device, depth: int, half: bool
) -> Any:
    """The evaluation graph; its inputs are those of ``evaluation_inputs``. Arguments as for training."""
    fn, types = dali()
    crop = recipe.val_crop_size

    def graph() -> Any:
        raw = fn.external_source(name="raw", dtype=types.UINT8, ndim=1)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
        image = fn.decoders.image(
            raw,
            device=decoder_of(device),
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # a GPU then interpolates colours as the CPU's decoder and Pillow do
        )
        image = fn.resize(image, size=size, **_interpolation(recipe))
        image = fn.slice(
            image,
            anchor,
            np.array([crop, crop], np.int32),
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=0,
        )
        return fn.crop_mirror_normalize(image, **_normalisation(recipe, half))

    return _pipeline(graph, batch_size, threads, device, depth)


def evaluation_inputs(recipe: Recipe, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """What the evaluation graph takes besides the bytes: name → [n, …]."""
    resized = resized_size(sizes, recipe.val_resize_size)
    return {
        "size": resized.astype(np.float32),
        "anchor": centre_crop(resized, recipe.val_crop_size).astype(np.int32),
    }
