"""Both loaders: exact evaluation, the same global batches for any number of ranks, resume, interface."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalesnn.data import dali_graph
from scalesnn.data.augment import Recipe

LOADERS = [("--loader", "dali"), ("--loader", "torchvision", "-j", "0")]
both = pytest.mark.parametrize("loader", LOADERS, ids=["dali", "torchvision"])
FULL = ("--auto-augment", "ta_wide", "--random-erase", "0.4", "--mixup-alpha", "0.2", "--cutmix-alpha", "1")


def digest(*tensors: Tensor) -> str:
    return hashlib.md5(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def rows(keys: Any, images: Tensor, targets: Tensor) -> dict[int, str]:
    """Position in the epoch → digest of pixels and target."""
    return {position: digest(images[i], targets[i]) for i, position in enumerate(keys.positions.tolist())}


def whole_epoch(data: Any, epoch: int, start: int = 0) -> list[dict[int, str]]:
    batches = enumerate(data.train.epoch(epoch, start), start)
    return [rows(data.train.keys(epoch, number), images, targets) for number, (images, targets) in batches]


@both
def test_resume_on_other_numbers_of_ranks_sees_bitwise_the_same_batches(
    loader: tuple[str, ...], folder: Path, open_loaders: Any
) -> None:
    flags = (*loader, *FULL)
    alone = open_loaders(folder, *flags, batch_size=12)
    unbroken = {epoch: whole_epoch(alone, epoch) for epoch in (0, 1)}
    steps = np.random.default_rng(0).integers(0, 2 * len(alone.train), 10).tolist()
    worlds = {
        world: [
            open_loaders(folder, *flags, batch_size=12 // world, rank=rank, world_size=world)
            for rank in range(world)
        ]
        for world in (2, 1, 3)
    }
    for step, world in zip(steps, [2, 1, 3, 2, 1, 3, 2, 1, 3, 2], strict=True):
        epoch, start = divmod(step, len(alone.train))
        parts = [whole_epoch(data, epoch, start)[:2] for data in worlds[world]]
        for number, batch in enumerate(zip(*parts, strict=True)):
            joined = {position: value for part in batch for position, value in part.items()}
            assert joined == unbroken[epoch][start + number], f"step {step} on {world} ranks"


@pytest.mark.parametrize("images", [2, 7, 100, 1001])
def test_evaluation_is_exact_for_any_number_of_ranks(
    images: int, tmp_path: Path, make_folder: Any, open_loaders: Any
) -> None:
    root = make_folder(tmp_path, 3, images, smallest=8, largest=16)
    for split in ("train", "val"):  # two images leave a class empty
        for number in range(3):
            if not any((root / split / f"class_{number}").glob("*.jpg")):
                (root / "val" / f"class_{number}").rmdir()
                for leftover in (root / "train" / f"class_{number}").glob("*"):
                    leftover.unlink()
                (root / "train" / f"class_{number}").rmdir()
    small = ("--val-resize-size", "8", "--val-crop-size", "8")
    reference: list[str] | None = None
    for world in (1, 2, 3, 4):
        seen: list[str] = []
        lengths = set()
        for rank in range(world):
            data = open_loaders(root, *small, batch_size=16, rank=rank, world_size=world)
            lengths.add(len(data.val))
            for batch, label in data.val.epoch(0):
                assert batch.shape[1:] == (3, 8, 8)
                seen += [digest(batch[i], label[i]) for i in range(len(batch))]
            data.close()
        assert len(lengths) == 1
        reference = reference or sorted(seen)
        assert len(seen) == images
        assert sorted(seen) == reference


@both
def test_batches_have_the_agreed_form(loader: tuple[str, ...], folder: Path, open_loaders: Any) -> None:
    data = open_loaders(
        folder,
        *loader,
        "--auto-augment",
        "none",
        "--mixup-alpha",
        "0",
        "--cutmix-alpha",
        "0",
        dtype=torch.bfloat16,
    )
    images, targets = next(iter(data.train))
    assert images.shape == (6, 3, 32, 32)
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.int64
    assert data.classes == ["class_0", "class_1", "class_2"]
    assert (len(data.train), data.train.number_of_images) == (10, 61)
    assert (len(data.val), data.val.number_of_images) == (5, 25)
    assert data.train.stats["data_wait_s"] > 0
    mixed = open_loaders(folder, *loader)
    _, targets = next(iter(mixed.train))
    assert targets.shape == (6, 3)
    assert torch.allclose(targets.sum(dim=1), torch.ones(6))
    assert next(iter(mixed.val))[1].dtype == torch.int64


@both
def test_labels_belong_to_their_images(loader: tuple[str, ...], folder: Path, open_loaders: Any) -> None:
    data = open_loaders(folder, *loader, "--mixup-alpha", "0", "--cutmix-alpha", "0")
    for number, (_, targets) in enumerate(data.train.epoch(0)):
        names = [data.train.index.names[image] for image in data.train.keys(0, number).images]
        assert [f"class_{label}" for label in targets.tolist()] == [name.split("/")[0] for name in names]


def test_worker_processes_change_nothing(folder: Path, open_loaders: Any) -> None:
    alone = open_loaders(folder, "--loader", "torchvision", *FULL, "-j", "0")
    workers = open_loaders(folder, "--loader", "torchvision", *FULL, "-j", "2")
    next(workers.train.epoch(0))  # an epoch that is given up
    assert whole_epoch(workers, 1, start=4) == whole_epoch(alone, 1, start=4)


def test_threads_and_batches_ahead_change_nothing(folder: Path, open_loaders: Any) -> None:
    one = open_loaders(folder, *FULL, "-j", "1")
    three = open_loaders(folder, *FULL, "-j", "3")
    next(three.train.epoch(0))  # an epoch that is given up
    assert whole_epoch(three, 1) == whole_epoch(one, 1)


@pytest.mark.parametrize("loader", [("--loader", "dali"), ("--loader", "torchvision", "-j", "1")])
def test_loading_leaves_the_random_state_of_the_model_alone(
    loader: tuple[str, ...], folder: Path, open_loaders: Any
) -> None:
    data = open_loaders(folder, *loader, *FULL)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(data.train.epoch(0))
    list(data.val.epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_compute_dtype_only_rounds(
    dtype: torch.dtype, loader: tuple[str, ...], folder: Path, open_loaders: Any
) -> None:
    exact, rounded = open_loaders(folder, *loader, *FULL), open_loaders(folder, *loader, *FULL, dtype=dtype)
    for (images, targets), (other, other_targets) in zip(
        exact.train.epoch(1), rounded.train.epoch(1), strict=True
    ):
        assert other.dtype == dtype
        assert torch.allclose(images, other.float(), atol=0.02)
        assert torch.equal(targets, other_targets)


def test_another_seed_or_epoch_gives_other_pixels(folder: Path, open_loaders: Any) -> None:
    data, other = open_loaders(folder, *FULL), open_loaders(folder, *FULL, seed=6)
    first = set().union(*(batch.values() for batch in whole_epoch(data, 0)))
    for batches in (whole_epoch(data, 1), whole_epoch(other, 0)):
        assert not first & set().union(*(batch.values() for batch in batches))


@both
def test_repeated_augmentation_shows_copies_augmented_differently(
    loader: tuple[str, ...], folder: Path, open_loaders: Any
) -> None:
    data = open_loaders(
        folder, *loader, "--ra-sampler", "--ra-reps", "3", "--mixup-alpha", "0", "--cutmix-alpha", "0"
    )
    images, _ = next(data.train.epoch(0))
    keys = data.train.keys(0, 0)
    assert np.bincount(keys.images)[keys.images].tolist() == [3] * 6
    assert len({digest(image) for image in images}) == 6


def test_ragged_last_batches_may_be_empty(tmp_path: Path, make_folder: Any, open_loaders: Any) -> None:
    root = make_folder(tmp_path, 6, 4)
    counts = []
    for rank in range(3):
        data = open_loaders(root, batch_size=1, rank=rank, world_size=3)
        counts.append([len(images) for images, _ in data.val.epoch(0)])
    assert counts == [[1, 1], [1, 0], [1, 0]]


def test_without_a_data_path_the_shipped_images_are_used(open_loaders: Any) -> None:
    size = (
        "--train-crop-size",
        "28",
        "--val-resize-size",
        "28",
        "--val-crop-size",
        "28",
        "--mixup-alpha",
        "0",
        "--cutmix-alpha",
        "0",
    )
    data = open_loaders(None, *size, batch_size=50)
    assert data.train.number_of_images == 6000
    assert "ship" in data.notices[0]
    labels = torch.cat([labels for _, labels in data.val.epoch(0)])
    assert torch.bincount(labels).tolist() == [100] * 10
    assert "ankle_boot" in data.classes


@pytest.mark.parametrize(("policy", "rewritten"), [("none", False), ("ta_wide", True)])
def test_dali_rewrites_a_graph_only_if_it_has_conditions(monkeypatch, policy, rewritten):
    """Rewriting takes seconds of CPU time at every start, augmentation or not."""
    dali = pytest.importorskip("nvidia.dali")
    plain, asked = dali.pipeline_def, []

    def pipeline_def(**options):
        asked.append(options["enable_conditionals"])
        return plain(**options)

    monkeypatch.setattr(dali, "pipeline_def", pipeline_def)
    recipe = Recipe(policy=policy, train_crop_size=28)
    dali_graph.make_train_pipeline(recipe, 2, 1, torch.device("cpu"), 1, False)
    dali_graph.make_evaluation_pipeline(recipe, 2, 1, torch.device("cpu"), 1, False)
    assert asked == [rewritten, False]
