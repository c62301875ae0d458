"""Accuracy against a plain count, and averages that weigh every image the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalesnn.training.metrics import Averages, accuracy, fit_targets


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_accuracy_is_a_count(images, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(images, classes, generator=generator)
    target = torch.randint(classes, (images,), generator=generator)
    acc1, acc5 = accuracy(output, target, (1, 5))
    order = output.argsort(dim=1, descending=True).tolist()
    expected1 = sum(row[0] == t for row, t in zip(order, target.tolist(), strict=True))
    expected5 = sum(t in row[:5] for row, t in zip(order, target.tolist(), strict=True))
    assert acc1.item() == pytest.approx(100 * expected1 / images)
    assert acc5.item() == pytest.approx(100 * expected5 / images)


def test_mixed_targets_count_for_their_heaviest_class():
    output = torch.eye(3)
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.0, 0.2, 0.8]])
    assert accuracy(output, mixed)[0].item() == pytest.approx(200 / 3)


def test_empty_batch_counts_nothing():
    averages = Averages(("loss",), torch.device("cpu"))
    assert accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))[0] == 0
    averages.add({"loss": torch.tensor(float("nan"))}, 0)
    averages.add({"loss": torch.tensor(2.0)}, 3)
    assert averages.means() == {"loss": 2.0}


def test_averages_weigh_by_images_and_go_on_after_a_restore():
    first = Averages(("loss", "acc1"), torch.device("cpu"))
    first.add({"loss": torch.tensor(1.0), "acc1": torch.tensor(50.0)}, 30)
    second = Averages(("loss", "acc1"), torch.device("cpu"))
    second.restore(first.sums.tolist())
    second.add({"loss": torch.tensor(4.0), "acc1": torch.tensor(100.0)}, 10)
    assert second.means() == {"loss": pytest.approx(1.75), "acc1": pytest.approx(62.5)}


def test_mixed_targets_are_widened_to_a_larger_head():
    assert fit_targets(torch.ones(2, 3), 5).tolist() == [[1, 1, 1, 0, 0]] * 2
    assert fit_targets(torch.tensor([1, 2]), 5).tolist() == [1, 2]
