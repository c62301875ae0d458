"""DALI's memory on a GPU is kept until the kernels that read it have run; the test fires the events."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from scalesnn.data.borrowed import BorrowedMemory
from scalesnn.data.dali_loader import DaliLoader


class Gpu:
    """Stands for a stream whose kernels run when the test says so."""

    def __init__(self) -> None:
        self.queued = self.done = 0

    def event(self) -> Any:
        gpu = self

        class Event:
            def record(self, stream: Any) -> None:
                assert stream is gpu
                gpu.queued += 1
                self.place = gpu.queued

            def query(self) -> bool:
                return self.place <= gpu.done

            def synchronize(self) -> None:
                gpu.done = max(gpu.done, self.place)

        return Event()


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def alive(references: list[Any]) -> list[bool]:
    gc.collect()
    return [reference() is not None for reference in references]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_batch_of_dali_stays_until_the_kernels_that_read_it_have_run(
    split: str, gpu: Gpu, folder: Path, open_loaders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_loaders(folder, "--loader", "dali")
    loader: DaliLoader = getattr(data, split)
    expected = [images.clone() for images, _ in loader.epoch(0)]
    loader.borrowed = BorrowedMemory(torch.device("cpu"), gpu.event, lambda device: gpu)
    addresses: list[int] = []
    from_dlpack = torch.from_dlpack

    def watched(output: Any) -> torch.Tensor:
        tensor = from_dlpack(output)
        addresses.append(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(torch, "from_dlpack", watched)
    kept = []
    for number, (images, _) in enumerate(loader.epoch(0)):
        torch.testing.assert_close(images, expected[number], rtol=0, atol=0)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.untyped_storage().data_ptr() not in addresses, "DALI's memory was handed out"
        kept.append(len(loader.borrowed))
        if number == 1:
            gpu.done = 1  # the first batch has been read, the second not yet
    assert kept[:4] == [1, 2, 2, 3]
    loader.close()
    assert gpu.done == gpu.queued, "closed while kernels were still reading"
    assert len(loader.borrowed) == 0


def test_tensors_go_in_the_order_of_their_events(gpu: Gpu) -> None:
    memory = BorrowedMemory(torch.device("cpu"), gpu.event, lambda device: gpu)
    references = []
    for number in range(4):
        tensor = torch.full((2, 3), float(number))
        references.append(weakref.ref(tensor))
        copied = memory.copy(tensor, torch.float64)
        assert copied.dtype == torch.float64
        assert copied[0, 0] == number
        del tensor
    assert alive(references) == [True] * 4
    gpu.done = 2
    memory.release()
    assert alive(references) == [False, False, True, True]
    memory.wait()
    assert alive(references) == [False] * 4
    assert gpu.done == 4


def test_a_copy_is_made_where_dtype_and_device_agree_already(gpu: Gpu) -> None:
    memory = BorrowedMemory(torch.device("cpu"), gpu.event, lambda device: gpu)
    tensor = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    copied = memory.copy(tensor, torch.float32)
    assert copied.data_ptr() != tensor.data_ptr()
    assert copied.stride() == tensor.stride()
