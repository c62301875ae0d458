"""What every module of the library rests on: errors for users, step modes, and state that lives over
time-steps."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn.movers import missing

__all__ = ["MemoryModule", "MultiStepModule", "StepModule", "UserError", "printable", "speak_utf8"]


def printable(text: str) -> str:
    """``text`` on one line that every terminal shows: control characters (a line break in a file's name) as
    escapes, bytes that are not UTF-8 as the replacement character."""
    if text.isprintable():
        return text
    shown = ("\ufffd" if "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in text)
    return "".join(shown)


class UserError(ValueError):
    """Bad input from the user. The entry points print it as one line, without a traceback, and exit with
    code 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def speak_utf8() -> None:
    """Have this process print UTF-8 whatever the locale says, and never fail at a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


class StepModule:
    """Mixin of modules that know a step mode: ``'s'`` takes one time-step [N, …], ``'m'`` a sequence [T, N,
    …]."""

    _step_mode: str = "s"
    supported_step_modes: tuple[str, ...] = ("s", "m")
    keeps_step_mode_of_children: bool = False  # functional.set_step_mode does not go below such a module

    @property
    def step_mode(self) -> str:
        """``'s'`` or ``'m'``. Raises UserError when set to a mode that the module does not support."""
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in self.supported_step_modes:
            modes = " or ".join(repr(mode) for mode in self.supported_step_modes)
            raise UserError(f"step_mode of {type(self).__name__} must be {modes}, got {value!r}")
        self._step_mode = value


class MultiStepModule(StepModule):
    """Mixin of modules that only take sequences."""

    _step_mode = "m"
    supported_step_modes = ("m",)


class MemoryModule(nn.Module, StepModule):
    """A module whose memories (such as a membrane potential) last over time-steps until ``reset()``.

    A memory is read and written like an attribute. It is no part of ``state_dict()``, it moves with
    ``.to()``, and ``copy.deepcopy`` and ``pickle`` leave it behind: the copy starts from the reset values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memories: dict[str, Any] = {}
        self._memory_reset_values: dict[str, Any] = {}

    def register_memory(self, name: str, value: Any) -> None:
        """Add the memory ``name``; ``value`` is its value now and after every ``reset()``.

        Raises:
            ValueError: the module already has an attribute of this name.
        """
        if hasattr(self, name):
            raise ValueError(f"{type(self).__name__} already has an attribute {name!r}")
        self._memories[name] = value
        self._memory_reset_values[name] = copy.deepcopy(value)

    def set_reset_value(self, name: str, value: Any) -> None:
        """Change the value that the memory ``name`` takes at the next ``reset()``."""
        if name not in self._memories:
            raise KeyError(f"{type(self).__name__} has no memory {name!r}")
        self._memory_reset_values[name] = copy.deepcopy(value)

    def reset(self) -> None:
        """Give every memory its reset value."""
        for name, value in self._memory_reset_values.items():
            self._memories[name] = copy.deepcopy(value)

    def detach(self) -> None:
        """Cut the memories from the autograd graph (truncated backpropagation through time)."""
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                self._memories[name] = value.detach()

    def memories(self) -> Iterator[Any]:
        """The memories' values."""
        yield from self._memories.values()

    def named_memories(self) -> Iterator[tuple[str, Any]]:
        """The memories' names and values."""
        yield from self._memories.items()

    def extra_repr(self) -> str:
        """What ``print(module)`` shows of it."""
        return f"step_mode={self.step_mode}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``single_step_forward`` or ``multi_step_forward``, as ``step_mode`` says."""
        if self.step_mode == "s":
            return self.single_step_forward(*args, **kwargs)
        return self.multi_step_forward(*args, **kwargs)

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One time-step: [N, …] to [N, …]. Subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} does not define single_step_forward")

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A sequence [T, N, …], one step after the other."""
        return torch.stack([self.single_step_forward(x, *args, **kwargs) for x in x_seq])

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories")
        if memories is not None and name in memories:
            return memories[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        memories = self.__dict__.get("_memories")
        if memories is not None and name in memories:
            memories[name] = value
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_memories", {}):
            del self._memories[name], self._memory_reset_values[name]
        else:
            super().__delattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memories": copy.deepcopy(self._memory_reset_values)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryModule:
        for values in (self._memories, self._memory_reset_values):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = fn(value)
        return super()._apply(fn, recurse)


if not TYPE_CHECKING:  # for type checkers a name that is not here is an error

    def __getattr__(name: str) -> Any:
        """Say what comes nearest to a name of SpikingJelly's that is not here."""
        raise missing(__name__, name, __all__)
