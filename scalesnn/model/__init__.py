"""Spiking ResNets: ``from scalesnn.model import spiking_resnet, sew_resnet, ms_resnet``."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["ms_resnet", "sew_resnet", "spiking_resnet"]


def __getattr__(name: str) -> ModuleType:
    """Import a submodule of ``__all__`` at its first use."""
    if name in __all__:
        return importlib.import_module(f"scalesnn.model.{name}")
    from scalesnn.movers import missing

    raise missing(__name__, name, __all__)
