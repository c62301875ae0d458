"""A CUDA graph's stand-in on the CPU: it records torch's operations, with their tensors and numbers.

As with a CUDA graph, recording runs nothing (whatever it changes is put back), a replay runs no Python,
numbers are frozen, results go into the recorded tensors, and reading a value on the host is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CpuRecorder", "NoHost"]

COPIES = (
    "scalar_tensor",
    "lift_fresh",
)  # torch.where with numbers, torch.tensor: made on the host, then copied
READS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "is_nonzero",
    "equal",
)


def name_of(func: Any) -> str:
    """The plain name of an operation: ``add_`` of ``aten.add_.Tensor``."""
    return str(func._schema.name).split("::")[-1]


class NoHost(TorchDispatchMode):
    """Refuses operations that would have the host wait for a GPU, as torch.cuda.set_sync_debug_mode does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)
        lists = isinstance(args[1] if len(args) > 1 else None, (list, tuple)) and name.startswith("index")
        mask = lists and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in READS + COPIES or mask:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


class Recording(NoHost):
    """Notes every operation, and puts back what it has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write:
                self._keep(value)
        for argument in func._schema.arguments:
            if argument.is_write and argument.name in kwargs:
                self._keep(kwargs[argument.name])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def _keep(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                with torch._C._DisableTorchDispatch():
                    self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))

    def undo(self) -> None:
        """Put back what the operations have changed."""
        for tensor, value in reversed(self.before.values()):
            tensor.detach().copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again, into the same tensors."""
        for func, args, kwargs, out in self.operations:
            schema = func._schema
            if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
                continue  # a view: it still is one
            new = func(*args, **kwargs)  # what it has written to is the same tensor
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


class CpuRecorder:
    """A ``CudaRecorder`` on the CPU."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.replays = 0

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """See ``CudaRecorder``."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """See ``CudaRecorder``."""
        with NoHost():
            yield

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """See ``CudaRecorder``."""
        recording, numbers = Recording(), torch.get_rng_state()
        with recording:
            step()
        with torch.no_grad():
            recording.undo()
        torch.set_rng_state(numbers)  # the CPU's generator stands for the GPU's here
        self.recordings.append(recording)

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay
