"""What is done to whole nets: resetting, detaching, step modes, backends; and running single-step code over
time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn.base import MemoryModule, StepModule, UserError
from scalesnn.movers import missing

__all__ = [
    "check_step_mode",
    "chunk_multi_step_forward",
    "detach_net",
    "multi_step_forward",
    "repeat_over_time",
    "reset_net",
    "seq_to_ann_forward",
    "set_backend",
    "set_step_mode",
]

Stateless = nn.Module | Callable[..., Tensor] | Sequence[nn.Module | Callable[..., Tensor]]


def reset_net(net: nn.Module) -> None:
    """Give every memory of the net its reset value: call it before every batch.

    Modules with a ``reset`` method of their own that are no MemoryModule are reset too.
    """
    for module in net.modules():
        reset = getattr(module, "reset", None)
        if callable(reset):
            reset()


def detach_net(net: nn.Module) -> None:
    """Cut every memory of the net from the autograd graph (truncated backpropagation through time)."""
    for module in net.modules():
        if isinstance(module, MemoryModule):
            module.detach()


def set_step_mode(net: nn.Module, step_mode: str) -> None:
    """Set every layer of the net to ``'s'`` (one time-step [N, …]) or ``'m'`` (sequences [T, N, …]).

    Layers inside a ``SeqToANNContainer`` or ``MultiStepContainer`` stay as they are: the container feeds
    them single steps. Such a container itself only takes sequences.

    Raises:
        UserError: the mode is neither, or the net has a layer that does not support it.
    """
    if step_mode not in ("s", "m"):
        raise UserError(f"step_mode must be 's' or 'm', got {step_mode!r}")
    waiting = [net]
    while waiting:
        module = waiting.pop()
        if isinstance(module, StepModule):
            if module.keeps_step_mode_of_children:
                continue
            module.step_mode = step_mode
        elif hasattr(module, "step_mode"):
            setattr(module, "step_mode", step_mode)  # noqa: B010 (the user's own class: mypy cannot know it)
        waiting.extend(module.children())


def check_step_mode(net: nn.Module, step_mode: str = "m") -> None:
    """Refuse a net that has a layer in the other step mode.

    Raises:
        UserError: names the first such layer and the line that cures it.
    """

    def check(module: nn.Module, name: str) -> None:
        if isinstance(module, StepModule) and module.keeps_step_mode_of_children:
            return
        mode = getattr(module, "step_mode", step_mode)
        if mode != step_mode:
            raise UserError(
                f"{name or 'model'} ({type(module).__name__}) is in step mode {mode!r}, but the input is "
                f"{'a sequence [T, N, …]' if step_mode == 'm' else 'one time-step [N, …]'}: "
                f"call functional.set_step_mode(model, {step_mode!r})"
            )
        for child_name, child in module.named_children():
            check(child, f"{name}.{child_name}" if name else child_name)

    check(net, "")


def set_backend(net: nn.Module, backend: str, instance: type | tuple[type, ...] = nn.Module) -> None:
    """Set the backend of every neuron of the net.

    Args:
        backend: one of the neuron's ``supported_backends``.
        instance: only modules of this class (or these classes), such as ``neuron.IFNode``.

    Raises:
        UserError: a neuron does not know the backend.
    """
    for module in net.modules():
        if isinstance(module, instance) and hasattr(module, "backend"):
            setattr(module, "backend", backend)  # noqa: B010 (any class that has one)


def multi_step_forward(x_seq: Tensor, single_step_module: Stateless) -> Tensor:
    """Run single-step modules over a sequence, one time-step after the other.

    Args:
        x_seq: [T, N, …].
        single_step_module: a module, a function, or a list to run in order, each in step mode ``'s'``.

    Returns:
        the outputs of all steps, [T, N, …].
    """
    return torch.stack([_chain(x, single_step_module) for x in x_seq])


def chunk_multi_step_forward(split_size: int, x_seq: Tensor, multi_step_module: nn.Module) -> Tensor:
    """Run a multi-step module over ``split_size`` time-steps at a time; its memories carry over.

    Returns:
        what ``multi_step_module(x_seq)`` returns, provided its layers treat time-steps alike (BatchNorm in
        training mode does not: its statistics are then those of a chunk).
    """
    return torch.cat([multi_step_module(x) for x in x_seq.split(split_size)])


def seq_to_ann_forward(x_seq: Tensor, stateless_module: Stateless) -> Tensor:
    """Run stateless modules on all time-steps at once, time and batch as one dimension.

    Args:
        x_seq: [T, N, …]. Nothing is copied where T and N lie one after the other in memory; a ``flatten(0,
            1)`` that is channels_last stays so.
        stateless_module: a module, a function, or a list of them to run in order, for inputs [T × N, …].

    Returns:
        [T, N, …].
    """
    return _chain(x_seq.flatten(0, 1), stateless_module).unflatten(0, x_seq.shape[:2])


def repeat_over_time(x: Tensor, T: int) -> Tensor:
    """The same image at every time-step: [N, …] to [T, N, …], as a view that takes no memory.

    Convolution and BatchNorm see that the steps are the same tensor and compute one of them.

    Raises:
        UserError: T < 1.
    """
    if T < 1:
        raise UserError(f"T must be at least 1, got {T}")
    return x.unsqueeze(0).expand(T, *x.shape)


def _chain(x: Tensor, modules: Stateless) -> Tensor:
    if not isinstance(modules, Sequence):
        return modules(x)
    for module in modules:
        x = module(x)
    return x


if not TYPE_CHECKING:  # for type checkers a name that is not here is an error

    def __getattr__(name: str) -> Any:
        """Say what comes nearest to a name of SpikingJelly's that is not here."""
        raise missing(__name__, name, __all__)
