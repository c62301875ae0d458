"""CUDA graphs as ``step_graph.StepGraph`` uses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

__all__ = ["CudaRecorder"]


class CudaRecorder:
    """Records CUDA graphs. The tests have another recorder, for the CPU."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Where all steps run; what ran before, and what runs after, is waited for on the device."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """A context in which waiting for the device raises RuntimeError."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record ``step`` without running it; returns what runs it."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: DALI's threads, and those that write checkpoints, go on calling CUDA meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay
