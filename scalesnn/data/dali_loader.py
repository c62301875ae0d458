"""The loader on NVIDIA DALI: decoding and augmentation in native threads, on the CPU or on the GPU.

A Python thread reads files and draws parameters; the main thread hands them to the pipeline and takes
results. Batches
in the pipeline are remembered until they come out: when a file cannot be decoded, DALI gives up the whole
batch, so the pipeline is made anew, the culprit is found and replaced, and the batches are run again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalesnn.data.augment import draw_train
from scalesnn.data.borrowed import BorrowedMemory
from scalesnn.data.dali_graph import (
    dali,
    decoder_of,
    evaluation_inputs,
    make_evaluation_pipeline,
    make_train_pipeline,
    train_inputs,
)
from scalesnn.data.headers import BadImageError, as_bitmap, decode_rgb, is_bitmap
from scalesnn.data.index import ImageIndex
from scalesnn.data.loader import Loader, LoaderSettings
from scalesnn.data.mixing import Mixer
from scalesnn.data.reading import Prefetcher, RawBatch, Reader
from scalesnn.data.sampling import BatchKeys
from scalesnn.data.transfer import to_device

__all__ = ["DaliLoader", "dali_problem"]


def dali_problem() -> str | None:
    """Why DALI cannot be used here, or None."""
    try:
        import nvidia.dali  # noqa: F401
    except Exception as error:
        return f"nvidia.dali cannot be imported ({error})"
    return None


@dataclass
class _Prepared:
    """A batch that is ready for the pipeline."""

    number: int
    raw: RawBatch
    inputs: dict[str, np.ndarray]


class DaliLoader(Loader):
    """Loads images with DALI; arguments as ``Loader``."""

    def __init__(
        self, index: ImageIndex, settings: LoaderSettings, mixer: Mixer | None = None, repetitions: int = 1
    ) -> None:
        super().__init__(index, settings, mixer, repetitions)
        self.threads = max(1, settings.workers)
        self.depth = settings.prefetch
        self.reader = Reader(self.bad, settings.train, self.threads)
        self._pipeline: Any = None
        # On a CPU torch has read an image before Python can let go of it.
        self.borrowed = BorrowedMemory(settings.device) if settings.device.type == "cuda" else None

    def configure(self, threads: int, depth: int) -> None:
        """Change the number of threads and of batches ahead; pixels and order stay the same."""
        self.stop()
        self._pipeline = None
        self.reader.close()
        self.threads, self.depth = threads, depth
        self.reader = Reader(self.bad, self.settings.train, threads)

    def _prepare(self, epoch: int, number: int) -> _Prepared:
        """Read and draw batch ``number``: a pure function of the files, the seed, epoch and number."""
        settings = self.settings
        raw = self.reader.read(self.keys(epoch, number))
        if settings.train:
            draws = draw_train(settings.recipe, settings.seed, epoch, raw.keys, raw.sizes)
            inputs = train_inputs(settings.recipe, draws)
        else:
            inputs = evaluation_inputs(settings.recipe, raw.sizes)
        return _Prepared(number, raw, inputs)

    def _make_pipeline(self) -> Any:
        """A new pipeline, warmed up with grey images, because its first run must fill its whole queue."""
        settings = self.settings
        make = make_train_pipeline if settings.train else make_evaluation_pipeline
        half = settings.dtype == torch.float16
        device = settings.device
        pipeline = make(settings.recipe, settings.batch_size, self.threads, device, self.depth, half)
        keys = BatchKeys(*(np.zeros(1, np.int64) for _ in range(4)))
        grey = RawBatch(
            keys, keys.images, [as_bitmap(np.full((64, 64, 3), 128, np.uint8))], np.array([[64, 64]]), 0
        )
        if settings.train:
            inputs = train_inputs(settings.recipe, draw_train(settings.recipe, 0, 0, keys, grey.sizes))
        else:
            inputs = evaluation_inputs(settings.recipe, grey.sizes)
        for _ in range(self.depth):
            self._feed(pipeline, _Prepared(0, grey, inputs))
        pipeline.schedule_run()
        for _ in range(self.depth):
            pipeline.share_outputs()
            pipeline.release_outputs()
        return pipeline

    @staticmethod
    def _feed(pipeline: Any, prepared: _Prepared) -> None:
        pipeline.feed_input("raw", [np.frombuffer(data, np.uint8) for data in prepared.raw.data])
        for name, values in prepared.inputs.items():
            pipeline.feed_input(name, values)

    def _run(self, prepared: _Prepared) -> None:
        if self._pipeline is None:
            self._pipeline = self._make_pipeline()
        if len(prepared.raw.data):
            self._feed(self._pipeline, prepared)
            self._pipeline.schedule_run()

    def _take(self, prepared: _Prepared) -> Tensor:
        """The images of a batch that was run; RuntimeError when decoding failed.

        DALI's dynamic executor does not write to an output again while a tensor holds it. On a CPU that
        tensor is handed on; on a GPU a copy of it, see ``BorrowedMemory``.
        """
        settings = self.settings
        if not len(prepared.raw.data):
            size = settings.recipe.train_crop_size if settings.train else settings.recipe.val_crop_size
            empty = torch.empty((0, 3, size, size), dtype=settings.dtype, device=settings.device)
            return empty.contiguous(memory_format=torch.channels_last)
        (output,) = self._pipeline.share_outputs()
        images = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
        self._pipeline.release_outputs()
        if self.borrowed is not None:
            return self.borrowed.copy(images, settings.dtype)
        return images.to(settings.device, settings.dtype)

    def _batches(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor, BatchKeys], None, None]:
        prefetcher = Prefetcher(
            lambda number: self._prepare(epoch, number), range(start, len(self)), self.depth
        )
        running: deque[_Prepared] = deque()
        fetched = start
        try:
            for _ in range(start, len(self)):
                while fetched < len(self) and len(running) < self.depth:
                    prepared = prefetcher.get(wait=not running)
                    if prepared is None:
                        break
                    assert isinstance(prepared, _Prepared)
                    self._run(prepared)
                    running.append(prepared)
                    fetched += 1
                try:
                    images = self._take(running[0])
                except RuntimeError as error:
                    self._pipeline = None
                    images = self._recover(epoch, running, error)
                raw = running.popleft().raw
                self.bad.replaced += raw.replaced
                labels = torch.from_numpy(self.index.labels[raw.images])
                yield images, to_device(labels, self.settings.device), raw.keys
        finally:
            prefetcher.close()
            self._drop(running)

    def _drop(self, running: deque[_Prepared]) -> None:
        """Take what is still in the pipeline out of it, or give the pipeline up."""
        try:
            for prepared in running:
                if self._pipeline is not None and len(prepared.raw.data):
                    self._pipeline.share_outputs()
                    self._pipeline.release_outputs()
        except (RuntimeError, StopIteration):
            # A bad image, which is found again when it is asked for again; or the epoch ended in _recover.
            self._pipeline = None
        running.clear()

    def _recover(self, epoch: int, running: deque[_Prepared], error: RuntimeError) -> Tensor:
        """A batch of ``running`` failed: find the bad images, prepare and run all of ``running`` again."""
        for _ in range(2 * self.depth * self.settings.batch_size):
            self._find_bad([batch.raw for batch in running], error)
            for place, batch in enumerate(running):
                running[place] = self._prepare(epoch, batch.number)
                self._run(running[place])
            try:
                return self._take(running[0])
            except RuntimeError as again:
                self._pipeline = None
                error = again
        raise error

    def _find_bad(self, batches: list[RawBatch], error: RuntimeError) -> None:
        """Note the images of failed batches that Pillow cannot decode, or else those that only Pillow can.

        Raises:
            UserError: see BadImages.add.
            RuntimeError: ``error``, when every image can be decoded: then it was not the images.
        """
        images = {
            image: data for raw in batches for image, data in zip(raw.images.tolist(), raw.data, strict=True)
        }
        if any(
            image in self.bad.reasons or (image in self.reader.by_pillow and not is_bitmap(data))
            for image, data in images.items()
        ):
            return  # read before it was known to be bad: to be read again
        before = len(self.bad.reasons)
        for image, data in images.items():
            try:
                decode_rgb(data)
            except BadImageError as reason:
                self.bad.add(image, str(reason))
        if len(self.bad.reasons) > before:
            return
        failing = {image for image, data in images.items() if not is_bitmap(data) and not self._decodes(data)}
        if not failing:
            raise error
        self.reader.by_pillow |= failing

    def _decodes(self, data: bytes) -> bool:
        """Whether DALI decodes these bytes."""
        from nvidia.dali.pipeline import Pipeline

        device = self.settings.device
        pipeline = Pipeline(
            1, 1, (device.index or 0) if device.type == "cuda" else None, prefetch_queue_depth=1
        )
        fn, types = dali()
        with pipeline:
            raw = fn.external_source(name="raw", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(raw, device=decoder_of(device)))
        pipeline.feed_input("raw", [np.frombuffer(data, np.uint8)])
        try:
            pipeline.run()
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """End a running epoch, the reading threads and the pipeline."""
        super().close()
        self.reader.close()
        if self.borrowed is not None:
            with contextlib.suppress(RuntimeError):  # a CUDA error of the run: nothing reads any more
                self.borrowed.wait()
        self._pipeline = None
