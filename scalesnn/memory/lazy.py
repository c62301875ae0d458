"""A sequence [T, N, …] that is not there: its chunks are made when they are asked for.

A chunk is K steps, from a multiple of K on. Gradients are asked for last chunk first, as they come. Some are
kept (``Kept``): a chunk from when it is first made until nobody can ask for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Chunk",
    "Kept",
    "Lazy",
    "Lease",
    "Options",
    "chunk_of",
    "done",
    "reader",
    "spans",
    "strides_of_sequence",
]

Chunk = Callable[[int, int], Tensor]


class Options(NamedTuple):
    """How a net is streamed.

    Attributes:
        steps: K. detach: no gradient goes back over chunk borders.
        keep_borders: potentials at chunk borders are kept, not made again in backward.
        whole: gradients of the net's front stand whole, too (see ``front``).
        at_once: gradients are made whole where they come up, because weights are not there later (FSDP2,
            ZeRO-3).
    """

    steps: int
    detach: bool = False
    keep_borders: bool = False
    whole: bool = False
    at_once: bool = False


class Lease:
    """Says that somebody outside may ask for chunks of these sequences, as long as it lives."""

    def __init__(self, sequences: Iterable[Kept]) -> None:
        self.sequences = frozenset(sequences)
        for kept in self.sequences:
            kept.readers += 1

    def __del__(self) -> None:
        for kept in self.sequences:
            kept.readers -= 1


class Kept:
    """A sequence whose chunks are kept once made, the last first.

    When a chunk is made, the same chunk of the sequences that it was made of is given up, where nobody else
    has a lease on them: a gradient moves from one place to the next and is never there twice.

    Args:
        source: makes a chunk. lease: on the sequences that ``source`` reads.
    """

    def __init__(
        self, total: int, steps: int, source: Chunk | None = None, lease: Lease | None = None
    ) -> None:
        self.total, self.steps = total, steps
        self.chunks: dict[int, Tensor] = {}
        self.readers = 0
        self._source, self._lease = source, lease
        self._made = total  # steps from here on have been made

    def __call__(self, a: int, b: int) -> Tensor:
        """Steps ``a`` to ``b``, a chunk or a part of one."""
        self.make_from(a)
        first = a // self.steps * self.steps
        return self.chunks[first][a - first : b - first]

    def make_from(self, a: int = 0) -> None:
        """Make what has not been made of the steps from ``a`` on."""
        while self._made > a:
            assert self._source is not None
            first = (self._made - 1) // self.steps * self.steps
            self.put(first, self._source(first, self._made))

    @property
    def source(self) -> Chunk | None:
        """What makes the chunks that have not been made."""
        return self._source

    def put(self, first: int, chunk: Tensor) -> None:
        """Keep the chunk that begins at step ``first``; those after it are here."""
        self.chunks[first] = chunk
        self._made = first
        for kept in self._lease.sequences if self._lease is not None else ():
            if kept.readers == 1 and (kept.total, kept.steps) == (self.total, self.steps):
                kept.chunks.pop(first, None)
        if first == 0:
            self._source = self._lease = None

    @property
    def is_made(self) -> bool:
        """Whether all chunks have been made."""
        return self._made == 0


class Lazy(Tensor):
    """A tensor of which only the recipe of its chunks is kept.

    Attributes:
        make: from the first step and the one after the last to a dense chunk [K, N, …].
        steps: K. options: of the net's streaming.
        borders: the potentials before every chunk, where they are kept. rows: a max-pool's output as bits.
        lease: of a gradient, on the kept sequences that ``make`` reads; None: this is no gradient.
        depth: of a gradient, how many units' backward ``make`` goes through.
        done: to be called after a sweep over the chunks: gives back weights that were gathered for it.
    """

    make: Chunk
    steps: int
    options: Options
    borders: list[list[Tensor | None]]
    rows: Tensor
    lease: Lease | None
    depth: int
    done: Callable[[], None]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Chunk,
        options: Options,
        borders: list[list[Tensor | None]] | None = None,
    ) -> Lazy:
        lazy = Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=dtype, device=device)
        lazy.make, lazy.options = make, options
        lazy.steps = options.steps
        lazy.borders = [] if borders is None else borders
        lazy.lease, lazy.depth, lazy.done = None, 0, _nothing
        return lazy

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Lazy({tuple(self.shape)}, {self.dtype}, {self.steps} steps at a time)"

    def same(self) -> Lazy:
        """Another tensor of the same recipe."""
        other = Lazy(
            tuple(self.shape), self.stride(), self.dtype, self.device, self.make, self.options, self.borders
        )
        other.done = self.done
        return other if self.lease is None else other.is_gradient(self.lease.sequences, self.depth)

    def is_gradient(self, of: Iterable[Kept] = (), depth: int = 0) -> Lazy:
        """Say that this is a gradient, that ``make`` reads the sequences ``of``, and its depth. What somebody
        still holds of it after the backward pass becomes dense then: the weights it is made with change."""
        self.lease, self.depth = Lease(of), depth
        _remember(self)
        return self

    def whole(self) -> Tensor:
        """The dense sequence."""
        out = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        for a, b in spans(self.shape[0], self.steps, last_first=True):
            out[a:b] = self.make(a, b)
        self.done()
        return out

    def become(self, dense: Tensor) -> None:
        """Have the values of ``dense``, from now on."""
        self.make = reader(dense)
        if self.lease is not None:
            self.lease, self.depth = Lease(()), 0

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from scalesnn.memory.handlers import handle

        return handle(func, args, kwargs or {})


_passes: dict[int, weakref.WeakValueDictionary[int, Lazy]] = {}  # backward passes and their gradients


def _remember(gradient: Lazy) -> None:
    """Have a gradient made dense at the end of the backward pass, if somebody still holds it then."""
    number = torch._C._current_graph_task_id()
    if number < 0:  # not in a backward pass
        return
    if number not in _passes:
        _passes[number] = weakref.WeakValueDictionary()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _finish(number))
    _passes[number][id(gradient)] = gradient


@torch.no_grad()
def _finish(number: int) -> None:
    for gradient in list(_passes.pop(number).values()):
        gradient.become(gradient.whole())


def _nothing() -> None:
    pass


def done(*sequences: Tensor | None) -> None:
    """A sweep over these is over."""
    for x in sequences:
        if isinstance(x, Lazy):
            x.done()


def spans(total: int, steps: int, last_first: bool = False) -> Iterator[tuple[int, int]]:
    """The chunks of ``total`` time-steps."""
    starts = range(0, total, steps)
    return ((a, min(a + steps, total)) for a in (reversed(starts) if last_first else starts))


def reader(x: Tensor) -> Chunk:
    """What makes the chunks of a sequence, lazy or dense, without holding the Lazy tensor itself."""
    return x.make if isinstance(x, Lazy) else lambda a, b: x[a:b]


def chunk_of(x: Tensor | None, a: int, b: int) -> Tensor | None:
    """Steps ``a`` to ``b`` of a sequence, lazy or dense."""
    return None if x is None else reader(x)(a, b)


def strides_of_sequence(chunk: Tensor) -> tuple[int, ...]:
    """The strides that a sequence has whose chunks are like ``chunk``."""
    return (chunk[0].numel(), *chunk.stride()[1:])
