"""A short measurement that chooses threads and batches ahead for the DALI loader.

Pixels depend on neither, so a tuned run gives what an untuned one gives, sooner or with fewer threads. The
first batches
of epoch 0 are read again and again, so after the first pass the files are in memory: decoding and
augmentation are measured, not the disk.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from scalesnn.data.dali_loader import DaliLoader

__all__ = ["Measurement", "candidates", "choose", "tune"]

_WORTH = 1.05  # more threads or batches ahead must bring five per cent
_SECONDS = 1.0


@dataclass(frozen=True)
class Measurement:
    """What a setting reached."""

    threads: int
    depth: int
    images_per_s: float


def candidates(workers: int) -> list[int]:
    """1, 2, 4, … and ``workers``: the numbers of threads to try."""
    powers = [2**power for power in range(workers.bit_length()) if 2**power < workers]
    return [*powers, max(1, workers)]


def choose(measured: list[Measurement]) -> Measurement:
    """The first of ``measured`` (cheapest first) that no later one beats by more than five per cent."""
    best = measured[0]
    for other in measured[1:]:
        if other.images_per_s > _WORTH * best.images_per_s:
            best = other
    return best


def measure(loader: DaliLoader, threads: int, depth: int, seconds: float) -> Measurement:
    """Run the loader's first batches for ``seconds`` with these settings."""
    loader.configure(threads, depth)
    images, started = 0, 0.0
    while started == 0.0 or time.perf_counter() - started < seconds:
        for number, (batch, _) in enumerate(loader.epoch(0)):
            if started == 0.0 and number < min(depth, len(loader) - 1):
                continue  # the pipeline fills
            if started == 0.0:
                started = time.perf_counter()
                continue
            images += len(batch)
            if number >= 32 or time.perf_counter() - started >= seconds:
                break
        loader.stop()
        if images == 0 and len(loader) < 3:  # too few batches to say anything
            break
    return Measurement(threads, depth, images / max(time.perf_counter() - started, 1e-9))


def tune(loader: DaliLoader, seconds: float = _SECONDS) -> str:
    """Choose and set threads, then batches ahead. Returns a line that says what was measured and chosen."""
    replaced = loader.bad.replaced
    depth = loader.depth
    measure(loader, loader.threads, depth, 0.0)  # reads the files once
    by_threads = [measure(loader, threads, depth, seconds) for threads in candidates(loader.threads)]
    threads = choose(by_threads).threads
    by_depth = [measure(loader, threads, ahead, seconds) for ahead in (2, 4)]
    chosen = choose(by_depth)
    loader.configure(chosen.threads, chosen.depth)
    loader.bad.replaced = replaced
    tried = ", ".join(f"{entry.threads}: {entry.images_per_s:.0f}" for entry in by_threads)
    return (
        f"loader tuned: {chosen.threads} threads, {chosen.depth} batches ahead, "
        f"{chosen.images_per_s:.0f} images/s a rank (images/s by threads: {tried})"
    )
