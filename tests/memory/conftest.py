"""A policy against ``none``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from memory_nets import assert_same, step
from torch import Tensor, nn

from scalesnn.memory import apply_policy


@pytest.fixture
def compare() -> Callable[..., None]:
    """Compare a policy with ``none`` on copies of a net."""

    def run(model: nn.Module, policy: str, x: Tensor, tolerance: float = 1e-10, **autocast: Any) -> None:
        expected = step(copy.deepcopy(model), x, **autocast)
        found = step(apply_policy(copy.deepcopy(model), policy), x, **autocast)
        assert_same(found, expected, tolerance)

    return run
