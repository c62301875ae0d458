"""scalesnn: train large Spiking ResNets. ``from scalesnn import neuron, layer, surrogate, functional``."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["base", "functional", "layer", "model", "neuron", "surrogate"]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Import a submodule of ``__all__`` at its first use, so that ``import scalesnn`` stays light."""
    if name in __all__:
        return importlib.import_module(f"scalesnn.{name}")
    from scalesnn.movers import missing

    raise missing(__name__, name, __all__)
