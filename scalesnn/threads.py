"""How OpenMP's threads wait for work; to be set before torch, which loads OpenMP, is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

__all__ = ["let_threads_sleep"]

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have threads without work sleep at once (OMP_WAIT_POLICY=passive).

    By default libgomp's threads spin after every small parallel region, and take the cores from data loaders
    and from other people's processes. Nothing is changed where the user has set how threads wait.
    """
    if not any(name in environ for name in SETTINGS):
        environ["OMP_WAIT_POLICY"] = "passive"
