"""Rounds of a loop that a tracer need not all see: it sees one, and counts it for the others.

A traced training step (``trace``) has no values, only sizes and costs. Loops over chunks or samples whose
rounds cost alike go through ``alike``, which leaves out all but one of them while a step is traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Counter", "alike", "counted_by"]


class Counter(Protocol):
    """Counts what operations cost, each ``times`` times."""

    times: int


_counters: list[Counter] = []


@contextmanager
def counted_by(counter: Counter) -> Iterator[None]:
    """Inside, a step is traced and ``counter`` counts it."""
    _counters.append(counter)
    try:
        yield
    finally:
        _counters.pop()


def alike(rounds: Sequence[int], unlike: int = 0) -> Iterator[int]:
    """Go through ``rounds``; traced, through the first ``unlike`` and one that stands for the rest."""
    if not _counters:
        yield from rounds
        return
    counter = _counters[-1]
    yield from rounds[:unlike]
    rest = rounds[unlike:]
    if rest:
        before = counter.times
        counter.times *= len(rest)
        try:
            yield rest[min(1, len(rest) - 1)]
        finally:
            counter.times = before
