"""Data sets of one's own: they work, or one line says what is wrong with them, before long work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from scalesnn.base import UserError
from scalesnn.training.user_data import UserData, as_data


class Own(Dataset):
    """``labels[i]`` is the label of sample i; ``kept``: the data set has them as a list, too."""

    def __init__(self, labels: list[Any], classes: Any = ("a", "b", "c"), kept: bool = False) -> None:
        self.labels_inside = labels
        self.classes = classes
        if kept:
            self.targets = labels

    def __len__(self) -> int:
        return len(self.labels_inside)

    def __getitem__(self, i: int) -> Any:
        return torch.full((1, 4, 4), float(i)), self.labels_inside[i]


class Nameless(Own):
    """One that does not say its classes."""

    def __init__(self, labels: list[Any]) -> None:
        super().__init__(labels)
        del self.classes


def opened(train: Any, val: Any = None, workers: int = 0, mixup: float = 0.0) -> UserData:
    val = train if val is None else val
    args = SimpleNamespace(
        batch_size=2, workers=workers, disable_pinmemory=False, mixup_alpha=mixup, cutmix_alpha=0.0
    )
    order = SequentialSampler(train) if not isinstance(train, IterableDataset) else None
    return as_data((train, val, order, SequentialSampler(val)), args, torch.device("cpu"))


GOOD = Own([0, 1, 2, 1])
TENSORS = TensorDataset(torch.zeros(4, 1, 4, 4), torch.tensor([0, 2, 1, 7]))


def with_classes(dataset: Any) -> Any:
    dataset.classes = ["a", "b", "c"]
    return dataset


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (GOOD, [0, 1, 2, 1]),
        (Subset(GOOD, [3, 0]), [1, 0]),
        (Subset(Subset(GOOD, [3, 0, 2]), [2, 1]), [2, 0]),
        (ConcatDataset([GOOD, Subset(GOOD, [2, 0])]), [0, 1, 2, 1, 2, 0]),
        (Subset(ConcatDataset([GOOD, GOOD]), torch.tensor([4, 6])), [0, 2]),
        (Subset(with_classes(TENSORS), range(2)), [0, 2]),
        (Own([torch.tensor(1, dtype=torch.uint8)] * 2), [1, 1]),
        (Own([True, False]), [1, 0]),
    ],
)
def test_classes_come_from_the_data_set_inside(dataset: Any, labels: list[int]) -> None:
    data = opened(dataset)
    assert data.classes == ["a", "b", "c"]
    targets = torch.cat([targets for _, targets in data.train.epoch(0)])
    assert targets.tolist() == labels
    assert targets.dtype == torch.int64


def test_labels_in_a_list_that_a_transform_changes_are_not_refused() -> None:
    class Shifted(Own):
        def __getitem__(self, i: int) -> Any:
            image, label = super().__getitem__(i)
            return image, label - 10

    data = opened(Shifted([10, 11], kept=True))
    assert [targets.tolist() for _, targets in data.train.epoch(0)] == [[0, 1]]


def test_targets_may_be_shares_of_the_classes() -> None:
    share = torch.tensor([0.5, 0.5, 0.0])
    for mixup in (0.0, 0.2):
        ((_, targets),) = opened(Own([share, share]), mixup=mixup).train.epoch(0)
        assert targets.tolist() == [[0.5, 0.5, 0.0]] * 2


class Stream(IterableDataset):
    classes = ("a", "b")

    def __iter__(self) -> Any:
        return iter([])


class Pictures(Own):
    def __getitem__(self, i: int) -> Any:
        return "picture", 0


class Alone(Own):
    def __getitem__(self, i: int) -> Any:
        return torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (Stream(), "the training set, a Stream, cannot be asked for sample i"),
        (Nameless([0]), "Nameless does not say what classes it has; give it a list of names"),
        (ConcatDataset([GOOD, Nameless([0])]), "Nameless does not say what classes"),
        (ConcatDataset([GOOD, Own([0], ["a", "c"])]), "different classes, 3 (a, b, c) and 2 (a, c)"),
        (Own([0, 1], 10), "Own has .classes = 10; give it a list of names"),
        (Own([0, 1], "ab"), "Own has .classes = 'ab'"),
        (Own([0, 0], ["a"]), "one class only, a"),
        (Own([0, 0], []), "no classes"),
        (Own([]), "the training set, a Own, is empty"),
        (Subset(GOOD, []), "the training set, a Subset, is empty"),
        (Pictures([0]), "must be (tensor, label), got (str, int)"),
        (Alone([0]), "must be (tensor, label), got Tensor"),
        (Own([3, 0]), "label 3, but 3 classes have labels 0 to 2; sample 0 of the training set"),
        (Own([0, 0, -1], kept=True), "label -1, but 3 classes have labels 0 to 2; sample 2"),
        (Subset(with_classes(TENSORS), [0, 3]), "label 7, but 3 classes have labels 0 to 2; sample 1"),
        (Own([0.5, 1.0]), "must be a whole number, got torch.float64"),
        (Own(["cat", "dog"]), "the label a number"),
        (Own([None, None]), "samples that make no batch"),
    ],
)
def test_what_nothing_can_be_trained_on_is_refused(train: Any, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(train)
    assert expected in str(refused.value)


@pytest.mark.parametrize(("workers", "mixup"), [(0, 0.0), (0, 0.3), (1, 0.3)])
def test_a_label_that_no_list_names_is_refused_in_its_batch(workers: int, mixup: float) -> None:
    data = opened(ConcatDataset([GOOD, Own([5, 0])]), workers=workers, mixup=mixup)
    with pytest.raises(UserError) as refused:
        list(data.train.epoch(0))
    assert str(refused.value) == "load_data: label 5, but 3 classes have labels 0 to 2"


def test_the_validation_set_is_looked_at_before_training_too() -> None:
    for val, expected in (
        (Own([]), "the validation set, a Own, is empty"),
        (Own([9, 0]), "label 9, but 3 classes have labels 0 to 2; sample 0 of the validation set"),
        (Pictures([0]), "the validation set must be (tensor, label)"),
    ):
        with pytest.raises(UserError) as refused:
            opened(GOOD, val)
        assert expected in str(refused.value)


def test_images_of_different_sizes_are_refused_in_their_batch() -> None:
    class Sizes(Own):
        def __getitem__(self, i: int) -> Any:
            return torch.zeros(1, 4 + i, 4), 0

    with pytest.raises(UserError, match="samples that make no batch: stack expects each tensor to be equal"):
        list(opened(Sizes([0, 1])).train.epoch(0))


def test_looking_at_samples_leaves_the_random_generators() -> None:
    class Noisy(Own):
        def __getitem__(self, i: int) -> Any:
            return torch.rand(1, 4, 4), 0

    torch.manual_seed(1)
    before = torch.get_rng_state()
    opened(Noisy([0, 1]))
    assert torch.equal(torch.get_rng_state(), before)
