"""The random number generators of one process, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_state", "restore_random_state"]


def random_state() -> dict[str, Tensor]:
    """State of this process's random number generators: torch's, the GPU's, numpy's and Python's."""
    version, numbers, gauss = random.getstate()
    key = np.random.get_state(legacy=False)
    assert isinstance(key, dict)
    inner = key["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(inner["key"].astype(np.int64)),
        "numpy_rest": torch.tensor([inner["pos"], key["has_gauss"], key["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(state["torch"])
    numbers = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((numbers[0], tuple(numbers[1:]), None if gauss != gauss else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached)
    )
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
