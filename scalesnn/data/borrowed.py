"""Memory of another library that kernels on torch's stream read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["BorrowedMemory"]


class BorrowedMemory:
    """Takes tensors out of another library's GPU memory, and keeps that memory until this has happened.

    Torch queues its kernels: when Python lets go of a tensor, the kernels that read it may not have run yet.
    Torch's own allocator hands freed memory out in the order of the stream; DALI's allocator does not know
    that stream and lets its pipeline write there at once. So batches are copied into torch's memory (50 µs
    for 128 images on an H100), which the rest of the program may keep and drop as it likes, and DALI's
    tensor is held together with an event on torch's stream until the copy is over. Nothing waits for the GPU.

    Args:
        device: where the copies go.
        make_event: makes an event with ``record(stream)``, ``query()`` and ``synchronize()``.
        stream_of: the stream of torch's kernels on a device.
    """

    def __init__(
        self,
        device: torch.device,
        make_event: Callable[[], Any] = torch.cuda.Event,
        stream_of: Callable[[torch.device], Any] = torch.cuda.current_stream,
    ) -> None:
        self.device, self._make_event, self._stream_of = device, make_event, stream_of
        self._kept: deque[tuple[Tensor, Any]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of ``tensor`` in torch's memory, in its memory format; the caller may drop ``tensor``."""
        self.release()
        copied = tensor.to(self.device, dtype, copy=True)
        event = self._make_event()
        event.record(self._stream_of(self.device))
        self._kept.append((tensor, event))
        return copied

    def release(self) -> None:
        """Drop the tensors whose copies are over."""
        while self._kept and self._kept[0][1].query():
            self._kept.popleft()

    def wait(self) -> None:
        """Drop all tensors, once their copies are over."""
        for _, event in self._kept:
            event.synchronize()
        self._kept.clear()
