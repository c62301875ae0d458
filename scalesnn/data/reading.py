"""A thread that reads files and draws random choices ahead of the decoder."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalesnn.data.headers import (
    BadImageError,
    as_bitmap,
    decode_rgb,
    decodes_alike,
    image_size,
    looks_whole,
)
from scalesnn.data.loader import BadImages
from scalesnn.data.sampling import BatchKeys

__all__ = ["Prefetcher", "RawBatch", "Reader"]


@dataclass
class RawBatch:
    """Undecoded images.

    Attributes:
        keys: which images were asked for; in evaluation without the bad ones.
        images: int64 [n], which images were read: others than the keys' where a bad one was replaced.
        data: the files' bytes, or whatever a subclass of Reader makes of them.
        sizes: int64 [n, 2], heights and widths.
        replaced: how many bad images were replaced or left out.
    """

    keys: BatchKeys
    images: np.ndarray
    data: list[Any]
    sizes: np.ndarray
    replaced: int


class Reader:
    """Reads batches and replaces images that cannot be read.

    Args:
        bad: the images known to be bad; grows.
        train: replace bad images; otherwise leave them out.
        threads: how many threads read; 1 reads in the caller's.
        chunk: images that a thread takes at once.
    """

    def __init__(self, bad: BadImages, train: bool, threads: int, chunk: int = 16) -> None:
        self.chunk = chunk
        self.bad = bad
        self.train = train
        self.by_pillow: set[int] = set()  # readable, but not by the fast decoder
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, "scalesnn-read") if threads > 1 else None

    def _read_one(self, image: int) -> tuple[Any, tuple[int, int]]:
        """Bytes that the decoder can take, height and width of an image; BadImageError for a bad one."""
        data = self.bad.read(image)
        if image in self.by_pillow or not decodes_alike(data) or not looks_whole(data):
            pixels = decode_rgb(data)
            return as_bitmap(pixels), pixels.shape[:2]
        return data, image_size(data)

    def _read_good(self, image: int) -> tuple[int, Any, tuple[int, int]] | None:
        """Image ``image`` or its replacement; None for a bad image of an evaluation."""
        while True:
            if not self.train and image in self.bad.reasons:
                return None
            chosen = self.bad.replacement(image)
            try:
                return chosen, *self._read_one(chosen)
            except BadImageError as error:
                with self._lock:
                    self.bad.add(chosen, str(error))

    def read(self, keys: BatchKeys) -> RawBatch:
        """Read the images of ``keys``.

        Raises:
            UserError: a bad image where bad images stop the run, or too many of them.
        """
        chunks = [keys.images[at : at + self.chunk].tolist() for at in range(0, len(keys), self.chunk)]

        def read_chunk(images: list[int]) -> list[tuple[int, Any, tuple[int, int]] | None]:
            return [self._read_good(image) for image in images]

        run = map if self._pool is None or len(chunks) < 2 else self._pool.map
        found = [entry for chunk in run(read_chunk, chunks) for entry in chunk]
        good = [entry for entry in found if entry is not None]
        left_out = len(found) - len(good)
        if len(good) < len(found):
            keys = keys.select(np.array([entry is not None for entry in found], bool))
        images = np.array([entry[0] for entry in good], np.int64)
        return RawBatch(
            keys,
            images,
            [entry[1] for entry in good],
            np.array([entry[2] for entry in good], np.int64).reshape(-1, 2),
            left_out + int((images != keys.images).sum()),
        )

    def close(self) -> None:
        """End the reading threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class Prefetcher:
    """Runs ``prepare(k)`` for k in ``numbers`` in a thread, at most ``depth`` results ahead, in order.

    An exception of ``prepare`` is raised again by ``get``.
    """

    def __init__(self, prepare: Callable[[int], object], numbers: range, depth: int) -> None:
        self._results: queue.Queue[object] = queue.Queue(max(1, depth))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(prepare, iter(numbers)), daemon=True)
        self._thread.start()

    def _run(self, prepare: Callable[[int], object], numbers: Iterator[int]) -> None:
        for number in numbers:
            try:
                result = prepare(number)
            except BaseException as error:
                result = error
            while not self._ended.is_set():
                try:
                    self._results.put(result, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._ended.is_set() or isinstance(result, BaseException):
                return

    def get(self, wait: bool = True) -> object | None:
        """The next result; None where there is none yet and ``wait`` is false."""
        try:
            result = self._results.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """End the thread; results that were not fetched are dropped."""
        self._ended.set()
        self._thread.join()
