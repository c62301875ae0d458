"""Which images a batch holds, and every random number of the data pipeline, as pure functions.

Nothing here keeps state. The generator is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"): a counter of four words and a key of two are scrambled into four random words. The key is
the seed; the counter is (image, copy, epoch, purpose and block). So a number depends on what it is for, and
not on what was drawn
before it: any rank, thread or resumed run that asks again gets the same answer.

Order of an epoch. The images are permuted by (seed, epoch). Global batch k takes the positions [k B, (k + 1)
B). With B even, position j is paired with position j + B / 2 (mixup and cutmix mix the two), and rank r of W
takes the pairs r, r + W, r + 2 W, ... So the global batch, its augmentations and its pairs are the same for
every W that leaves an even number of images to each rank. With an odd number of images a rank, the positions
r, r + W, ... are dealt out singly: images and augmentations are still the same for every W, only the partners
of mixup and cutmix then depend on W.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np

__all__ = [
    "BatchKeys",
    "EvaluationOrder",
    "Purpose",
    "TrainOrder",
    "philox4x32",
    "random_permutation",
    "uniforms",
]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Purpose(enum.IntEnum):
    """What a random number is for: each purpose has its own stream. Part of every recorded run: never
    renumber."""

    ORDER = 0
    CROP = 1
    POLICY = 2
    ERASE = 3
    MIX = 4
    FRAMES = 5


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox 4x32 with ten rounds.

    Args:
        counter: uint32 [n, 4].
        key: 64 bits; its low half is the generator's first key word.

    Returns:
        uint32 [n, 4].
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=1).astype(np.uint32)


def _words(
    seed: int, epoch: int, purpose: Purpose, images: np.ndarray, copies: np.ndarray | int, blocks: int
) -> np.ndarray:
    """uint32 [n, 4 blocks]: the words of each (image, copy)."""
    counter = np.empty((len(images), blocks, 4), np.uint32)
    counter[:, :, 0] = np.asarray(images)[:, None]
    counter[:, :, 1] = np.broadcast_to(np.asarray(copies), len(images))[:, None]
    counter[:, :, 2] = epoch
    counter[:, :, 3] = (int(purpose) << 16) + np.arange(blocks)
    return philox4x32(counter.reshape(-1, 4), seed & (2**64 - 1)).reshape(len(images), 4 * blocks)


def uniforms(
    seed: int, epoch: int, purpose: Purpose, images: np.ndarray, copies: np.ndarray | int, count: int
) -> np.ndarray:
    """``count`` numbers in [0, 1) for each image: float64 [n, count], multiples of 2**-32.

    Args:
        seed: the run's seed (any integer; its low 64 bits count).
        epoch: the epoch, from 0.
        purpose: what the numbers are for.
        images: int [n], the images' places in the index.
        copies: int [n] or a scalar: which repetition of the image in this epoch (repeated augmentation).
        count: how many numbers an image needs.
    """
    return _words(seed, epoch, purpose, images, copies, -(-count // 4))[:, :count] * 2.0**-32


def random_permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of 0 … count - 1 (int64), a pure function of its arguments."""
    words = _words(seed, epoch, Purpose.ORDER, np.arange(count), 0, 1).astype(np.uint64)
    return np.argsort((words[:, 0] << _32) | words[:, 1], kind="stable")


@dataclass(frozen=True)
class BatchKeys:
    """What one rank loads for one batch; each field is int64 [n].

    Attributes:
        images: places in the index.
        copies: which repetition of the image in this epoch.
        positions: places in the epoch's order.
        pairs: the number that mixup and cutmix draw from: equal for the two images of a pair.
    """

    images: np.ndarray
    copies: np.ndarray
    positions: np.ndarray
    pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def select(self, mask: np.ndarray) -> BatchKeys:
        """The keys where ``mask`` (bool [n]) is true."""
        return BatchKeys(self.images[mask], self.copies[mask], self.positions[mask], self.pairs[mask])


class TrainOrder:
    """The order of every training epoch.

    Args:
        number_of_images: N ≥ 1.
        global_batch: images of all ranks together in a step, B ≥ 1.
        seed: the run's seed.
        repetitions: how many copies of an image follow each other (repeated augmentation, Hoffer et al.
            2020); an epoch then still has N images, of which N / repetitions are different ones.

    The last incomplete global batch of an epoch is left out; where B > N, the order is run through again
    until one batch is full.
    """

    def __init__(self, number_of_images: int, global_batch: int, seed: int, repetitions: int = 1) -> None:
        if number_of_images < 1 or global_batch < 1 or repetitions < 1:
            raise ValueError(
                "images, global batch and repetitions must be at least 1: "
                f"{number_of_images}, {global_batch}, {repetitions}"
            )
        self.number_of_images = number_of_images
        self.global_batch = global_batch
        self.seed = seed
        self.repetitions = repetitions
        self._permutation: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return max(1, self.number_of_images // self.global_batch)

    def _order(self, epoch: int) -> np.ndarray:
        cached = self._permutation
        if cached is None or cached[0] != epoch:
            cached = (epoch, random_permutation(self.seed, epoch, self.number_of_images))
            self._permutation = cached
        return cached[1]

    def rank_batch(self, epoch: int, batch: int, rank: int = 0, world_size: int = 1) -> BatchKeys:
        """The share of ``rank`` in global batch ``batch``; rank 0 of 1 has it all.

        Where the share is even, its image i is paired with image i + n / 2.

        Raises:
            ValueError: the global batch cannot be dealt out evenly.
        """
        size = self.global_batch
        if size % world_size:
            raise ValueError(
                f"a global batch of {size} images cannot be dealt out to {world_size} ranks evenly"
            )
        if (size // world_size) % 2 == 0:
            first = np.arange(rank, size // 2, world_size)
            inside = np.concatenate((first, first + size // 2))
            pairs = np.concatenate((first, first))
        else:
            inside = pairs = np.arange(rank, size, world_size)
        positions = batch * size + inside
        different = positions // self.repetitions
        laps, places = np.divmod(different, self.number_of_images)
        copies = positions % self.repetitions + self.repetitions * laps
        return BatchKeys(self._order(epoch)[places], copies, positions, batch * size + pairs)


class EvaluationOrder:
    """Every image exactly once over all ranks, in the index's order.

    Global batch k holds the images [k B, (k + 1) B), the last one what is left; rank r of W takes every W-th
    of them from the r-th. All ranks have the same number of batches; the last may be shorter on some, or
    empty.
    """

    def __init__(self, number_of_images: int, global_batch: int) -> None:
        if number_of_images < 1 or global_batch < 1:
            raise ValueError(
                f"images and global batch must be at least 1: {number_of_images}, {global_batch}"
            )
        self.number_of_images = number_of_images
        self.global_batch = global_batch

    def __len__(self) -> int:
        return math.ceil(self.number_of_images / self.global_batch)

    def rank_batch(self, epoch: int, batch: int, rank: int = 0, world_size: int = 1) -> BatchKeys:
        """The share of ``rank`` in global batch ``batch``; ``epoch`` has no influence."""
        start = batch * self.global_batch
        end = min(start + self.global_batch, self.number_of_images)
        images = np.arange(start + rank, end, world_size)
        return BatchKeys(images, np.zeros_like(images), images, images)
