"""Mixins that a policy puts before the classes of a net's modules, and takes off again."""

from __future__ import annotations

from torch import nn

__all__ = ["put_before", "take_off"]


def put_before(module: nn.Module, mixin: type) -> None:
    """Have the module be of a class in which ``mixin`` stands before its own; the name stays."""
    own = type(module)
    module.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})


def take_off(net: nn.Module, *mixins: type) -> None:
    """Undo ``put_before`` of these, in all modules of the net; the last put on comes off first."""
    for module in net.modules():
        if isinstance(module, mixins):
            module.__class__ = type(module).__mro__[2]
