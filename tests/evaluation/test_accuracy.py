"""Counting right answers, against counts by hand and scipy-free tables of Wilson's interval."""

import pytest
import torch

from scalesnn.evaluation.accuracy import Tally, wilson_interval


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_is_that_of_newcombe_s_table(hits, count, low, high) -> None:
    assert wilson_interval(hits, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson_interval(count - hits, count)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_nothing_seen_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_counts_equal_those_by_hand() -> None:
    random = torch.Generator().manual_seed(0)
    classes, steps = 7, [1, 3]
    tally = Tally(steps, classes, torch.device("cpu"))
    top1, top5 = {1: 0, 3: 0}, {1: 0, 3: 0}
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for count in (6, 0, 9):
        targets = torch.randint(classes, (count,), generator=random)
        for T in steps:
            logits = torch.randn(count, classes, generator=random)
            tally.add(T, logits, targets)
            for row, target in zip(logits, targets.tolist(), strict=True):
                order = row.argsort(descending=True).tolist()
                top1[T] += order[0] == target
                top5[T] += target in order[:5]
                confusion[target, order[0]] += T == 3
    found = tally.close(lambda counts: counts)
    assert [(a.T, a.images, a.top1, a.top5) for a in found] == [(T, 15, top1[T], top5[T]) for T in steps]
    assert torch.equal(tally.confusion_KK, confusion)
    assert [hits for _, hits in found[1].of_class_K] == confusion.diagonal().tolist()
    pairs = tally.worst_pairs(3)
    off = confusion.clone().fill_diagonal_(0)
    assert [n for *_, n in pairs] == off.flatten().sort(descending=True).values[:3].tolist()
    assert all(off[a, b] == n for a, b, n in pairs)


def test_a_head_with_more_outputs_than_classes_is_counted() -> None:
    tally = Tally([1], 2, torch.device("cpu"))
    tally.add(1, torch.tensor([[0.0, 1, 9], [0, 3, 1]]), torch.tensor([1, 1]))
    (found,) = tally.close(lambda counts: counts)
    assert (found.images, found.top1, found.top5) == (2, 1, 2)
