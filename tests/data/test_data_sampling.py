"""The counter-based generator and the order of images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalesnn.data.sampling import (
    EvaluationOrder,
    Purpose,
    TrainOrder,
    philox4x32,
    random_permutation,
    uniforms,
)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors of Philox publish with Random123
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32(np.array([counter], np.uint32), key[0] | key[1] << 32)
    assert words[0].tolist() == expected


def test_numbers_do_not_depend_on_what_else_is_asked_for() -> None:
    images, copies = np.arange(50), np.arange(50) % 3
    alone = uniforms(7, 2, Purpose.CROP, images[30:31], copies[30:31], 5)
    assert np.array_equal(uniforms(7, 2, Purpose.CROP, images, copies, 23)[30:31, :5], alone)


@pytest.mark.parametrize("change", ["seed", "epoch", "purpose", "image", "copy"])
def test_numbers_change_with_everything_that_names_them(change: str) -> None:
    name = {"seed": 7, "epoch": 2, "purpose": Purpose.CROP, "image": 3, "copy": 0}
    other = {**name, change: Purpose.ERASE if change == "purpose" else name[change] + 1}

    def draw(n: dict[str, int]) -> np.ndarray:
        return uniforms(n["seed"], n["epoch"], Purpose(n["purpose"]), np.array([n["image"]]), n["copy"], 8)

    assert not np.isin(draw(name), draw(other)).any()


def test_numbers_are_uniform() -> None:
    from scipy import stats

    numbers = uniforms(1, 0, Purpose.POLICY, np.arange(4000), 0, 5)
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 0.06


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 300),
    half=st.integers(1, 6),
    world=st.integers(1, 5),
    repetitions=st.integers(1, 4),
    epoch=st.integers(0, 3),
    odd=st.booleans(),
)
def test_a_global_batch_is_the_same_for_any_number_of_ranks(
    images: int, half: int, world: int, repetitions: int, epoch: int, odd: bool
) -> None:
    size = world * (2 * half - odd)
    order = TrainOrder(images, size, seed=3, repetitions=repetitions)
    batch = len(order) - 1
    whole = order.rank_batch(epoch, batch)
    parts = [order.rank_batch(epoch, batch, rank, world) for rank in range(world)]

    def rows(keys: list) -> list[tuple[int, ...]]:
        return sorted(
            (position, image, copy)
            for key in keys
            for position, image, copy in zip(
                key.positions.tolist(), key.images.tolist(), key.copies.tolist(), strict=True
            )
        )

    assert rows(parts) == rows([whole])
    assert {len(part) for part in parts} == {size // world}


def test_pairs_never_straddle_ranks() -> None:
    order = TrainOrder(100, 24, seed=1)
    partner = {}
    for world in (1, 2, 3, 4, 6):
        for rank in range(world):
            keys = order.rank_batch(0, 1, rank, world)
            other = np.roll(keys.positions, len(keys) // 2)
            assert np.array_equal(keys.pairs, np.roll(keys.pairs, len(keys) // 2))
            for mine, its in zip(keys.positions.tolist(), other.tolist(), strict=True):
                assert partner.setdefault(mine, its) == its


def test_an_epoch_without_its_tail_shows_every_image_at_most_once() -> None:
    order = TrainOrder(103, 10, seed=1)
    seen = np.concatenate([order.rank_batch(4, batch).images for batch in range(len(order))])
    assert len(seen) == len(set(seen.tolist())) == 100


def test_epochs_have_different_orders() -> None:
    first, second = random_permutation(1, 0, 1000), random_permutation(1, 1, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == second).mean() < 0.02


def test_fewer_images_than_a_global_batch_repeat() -> None:
    order = TrainOrder(5, 12, seed=0)
    keys = order.rank_batch(0, 0)
    assert len(order) == 1
    assert np.bincount(keys.images, minlength=5).min() >= 2
    assert len({(image, copy) for image, copy in zip(keys.images, keys.copies, strict=True)}) == 12


def test_repeated_augmentation_spreads_the_copies_of_an_image_over_ranks() -> None:
    order = TrainOrder(64, 32, seed=2, repetitions=4)
    images = order.rank_batch(0, 0).images
    assert np.bincount(images)[images].tolist() == [4] * 32
    ranks = [set(order.rank_batch(0, 0, rank, 4).images.tolist()) for rank in range(4)]
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]


@pytest.mark.parametrize("images", [1, 7, 100, 1001])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_shows_every_image_exactly_once(images: int, world: int) -> None:
    order = EvaluationOrder(images, 8 * world)
    parts = [
        [order.rank_batch(0, batch, rank, world) for batch in range(len(order))] for rank in range(world)
    ]
    seen = np.concatenate([keys.images for part in parts for keys in part])
    assert sorted(seen.tolist()) == list(range(images))
    assert max(len(keys) for part in parts for keys in part) <= 8
