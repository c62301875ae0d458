"""Variants of the kernels as launches of the unit ask for them."""

from __future__ import annotations

from typing import Any

import torch
from oracle import ATAN

from scalesnn.kernels import cuda
from scalesnn.kernels.source import Variant, fields

__all__ = ["GIVEN", "no_arguments", "unit_variant"]

GIVEN = {
    "statistics": "x partial",
    "forward": "x spikes v bits",
    "backward": "x grad_spikes grad_x partial",
    "normalise_backward": "x grad_spikes grad_x mean scale mean_grad slope_grad",
    "channel_sums": "partial all_sums",
    "coefficients": "partial weight shift running_mean running_var batches affine statistics",
    "channel_gradients": "partial affine statistics coefficients grad_weight grad_shift",
    "pack": "x bits",
    "unpack": "bits spikes",
}


def no_arguments() -> dict[str, Any]:
    """A kernel's arguments: all pointers null, all numbers 0."""
    return {name: 0 for name, _ in fields()}


def unit_variant(
    kernel: str,
    dtype: torch.dtype,
    steps: int,
    *also: str,
    charge: int = 2,
    hard_reset: bool = True,
    normalised: bool = True,
    channels_last: bool = True,
    surrogate: str = ATAN,
    **others: Any,
) -> Variant:
    """That of a kernel over [T, 32, 64, 56, 56].

    Args:
        also: more pointers that are there. others: arguments of the kernel.
    """
    names = [*GIVEN[kernel].split(), *also]
    if normalised and kernel in ("forward", "backward"):
        names += ["mean", "scale", "bias"]
    arguments = no_arguments() | {
        "steps": steps,
        "size": 32 * 64 * 56 * 56,
        "channels": 64,
        "tau": 2.0,
        "slabs": 1,
    }
    arguments |= {"inner": 1 if channels_last else 56 * 56, "charge": charge, "hard_reset": hard_reset}
    arguments |= dict.fromkeys(names, 1 << 20) | others
    return cuda.variant_of(kernel, dtype, surrogate, arguments)
