"""Copies from host memory to the device that do not hold the host up."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device, pin: bool = True) -> Tensor:
    """``tensor`` on ``device``.

    To a GPU it goes through page-locked memory, which torch keeps until the copy is over, and nothing waits
    for the GPU; from ordinary memory (``pin`` False) the copy waits for all kernels that were queued before.
    """
    if device.type != "cuda" or not pin:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
