"""Copies to a GPU: from page-locked memory, without waiting; one for all that mixing draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalesnn.data import mixing
from scalesnn.data.mixing import Mixer, draw_mix
from scalesnn.data.sampling import TrainOrder
from scalesnn.data.transfer import to_device

GPU = torch.device("cuda", 0)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is done to bring tensors to a GPU, which are left where they are."""
    done: list[Any] = []

    def pin_memory(self: Tensor) -> Tensor:
        done.append("pinned")
        return self

    def to(self: Tensor, *where: Any, **settings: Any) -> Tensor:
        done.append((where, settings))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    return done


def test_a_copy_to_a_gpu_waits_for_nothing(copies: list[Any]) -> None:
    to_device(torch.arange(3), GPU)
    assert copies == ["pinned", ((GPU,), {"non_blocking": True})]


def test_without_page_locked_memory_it_is_an_ordinary_copy(copies: list[Any]) -> None:
    to_device(torch.arange(3), GPU, pin=False)
    assert copies == [((GPU,), {})]


def test_what_mixing_draws_goes_over_in_one_copy_and_mixes_as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tensor)
        return tensor.to(device)

    monkeypatch.setattr(mixing, "to_device", to_device)
    keys = TrainOrder(64, 16, 5, 1).rank_batch(0, 0, 0, 1)
    images = torch.rand(16, 3, 9, 7).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(16) % 5
    mixed, targets = Mixer(5, 5, 0.4, 1.0)(images, labels, 3, keys)
    assert len(sent) == 1
    draws = draw_mix(5, 3, keys, (9, 7), 0.4, 1.0)
    for i, partner in enumerate(draws.partner.tolist()):
        share = np.float32(draws.share[i])
        expected = torch.zeros(5)
        expected[labels[i]] += share
        expected[labels[partner]] += 1 - share
        torch.testing.assert_close(targets[i], expected)
        picture = torch.lerp(images[partner], images[i], float(draws.pixels[i]))
        top, bottom, left, right = draws.box[i].tolist()
        picture[:, top:bottom, left:right] = images[partner][:, top:bottom, left:right]
        torch.testing.assert_close(mixed[i], picture)
