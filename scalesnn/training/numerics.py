"""How numbers are computed on a GPU, what that costs, and what the summary of a run says of it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["numerics_of", "set_tf32"]


def set_tf32(enabled: bool) -> None:
    """Let float32 products of convolutions and matrices on a GPU round their factors to TF32, or not.

    Torch's own default is yes for convolutions and no for matrices.
    """
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def numerics_of(args: Any, device: torch.device, amp_dtype: torch.dtype | None) -> dict[str, str]:
    """Lines for the summary of a run: precision, and on a GPU which algorithms.

    Args:
        args: with tf32 and disable_uda.
        amp_dtype: of autocast; None: without.
    """
    precision = "float32" if amp_dtype is None else "bfloat16 autocast, float32 weights"
    if device.type != "cuda":
        return {"precision": precision}
    if args.tf32:
        products = "products in TF32 (factors of 10 bits, sums in float32)"
    else:
        products = "products in full precision (--tf32: up to 8 times the peak, factors of 10 bits)"
    if args.disable_uda:
        algorithms = (
            "cuDNN tries several at the first steps and takes the fastest; two runs differ in last bits"
        )
    else:
        algorithms = (
            "deterministic, two runs are equal; slower: cuDNN tries none and adds in a fixed order "
            "(--disable-uda: the fastest)"
        )
    return {
        "precision": f"{precision}; {'other ' if amp_dtype else ''}float32 {products}",
        "algorithms": algorithms,
    }
