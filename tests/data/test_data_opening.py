"""Flags, refusals, tuning, waiting notices and memory."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scalesnn.base import UserError
from scalesnn.data.tuning import Measurement, candidates, choose, tune


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--auto-augment", "ta_wyde"), "--auto-augment must be one of"),
        (("--train-crop-size", "0"), "--train-crop-size must be at least 1, got 0"),
        (("--val-crop-size", "-3"), "--val-crop-size must be at least 1"),
        (("--random-erase", "1.5"), "--random-erase is a probability"),
        (("--mixup-alpha", "-1"), "--mixup-alpha must be 0 or more"),
        (("--train-crop-area", "0"), "--train-crop-area is a share"),
        (("-j", "-1"), "--workers must be 0 or more"),
        (("--ra-reps", "0"), "--ra-reps must be at least 1"),
        (("--bad-image-list", "/nowhere/list.txt"), "--bad-image-list /nowhere/list.txt"),
        (("--loader", "torchvision", "--loader-tune", "on"), "--loader-tune on"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    flags: tuple[str, ...], message: str, folder: Path, open_loaders: Any
) -> None:
    with pytest.raises(UserError, match=message):
        open_loaders(folder, *flags)


def test_batch_size_below_one_is_refused(folder: Path, open_loaders: Any) -> None:
    with pytest.raises(UserError, match="--batch-size must be at least 1, got 0"):
        open_loaders(folder, batch_size=0)


def test_folders_that_cannot_be_are_refused(tmp_path: Path, make_folder: Any, open_loaders: Any) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_loaders(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no folder .*train"):
        open_loaders(tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    with pytest.raises(UserError, match="holds no class folders"):
        open_loaders(tmp_path / "empty")
    root = make_folder(tmp_path / "images", 6, 6)
    for file in (root / "val" / "class_1").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no image in class class_1"):
        open_loaders(root)
    (root / "val" / "class_1").rmdir()
    with pytest.raises(UserError, match="no folder for class class_1 of the training images"):
        open_loaders(root)
    (root / "val" / "class_1").mkdir()
    (root / "val" / "class_7").mkdir()
    with pytest.raises(UserError, match="has class class_7 that the training images do not have"):
        open_loaders(root)


def test_fewer_images_than_a_global_batch_are_said(folder: Path, open_loaders: Any) -> None:
    data = open_loaders(folder, batch_size=50, rank=1, world_size=2)
    assert "61 training images are fewer than a global batch of 100" in " ".join(data.notices)
    assert [len(images) for images, _ in data.train.epoch(0)] == [50]


def test_an_odd_batch_on_several_ranks_is_said_where_images_are_mixed(
    folder: Path, open_loaders: Any
) -> None:
    assert "odd batch size" in " ".join(open_loaders(folder, batch_size=3, world_size=2).notices)
    unmixed = open_loaders(folder, "--mixup-alpha", "0", "--cutmix-alpha", "0", batch_size=3, world_size=2)
    assert not unmixed.notices


def test_the_fingerprint_changes_with_the_list(tmp_path: Path, make_folder: Any, open_loaders: Any) -> None:
    root = make_folder(tmp_path, 6, 3)
    first = open_loaders(root).fingerprint
    assert open_loaders(root).fingerprint == first
    (root / "train" / "class_0" / "0000.jpg").rename(root / "train" / "class_1" / "0000.jpg")
    assert open_loaders(root).fingerprint != first


def test_nothing_imports_dali_before_a_pipeline_is_made() -> None:
    program = "import sys, scalesnn.data; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=100).returncode == 0


def test_tuning_takes_the_fewest_threads_that_reach_the_speed() -> None:
    assert candidates(1) == [1]
    assert candidates(6) == [1, 2, 4, 6]
    assert candidates(8) == [1, 2, 4, 8]
    measured = [Measurement(1, 3, 100.0), Measurement(2, 3, 180.0), Measurement(4, 3, 186.0)]
    assert choose(measured).threads == 2
    assert choose(measured[:1]).threads == 1


def test_a_tuned_loader_gives_the_same_batches(folder: Path, open_loaders: Any) -> None:
    plain = open_loaders(folder, "-j", "2")
    expected = [images for images, _ in plain.train.epoch(3)]
    tuned = open_loaders(folder, "-j", "2")
    line = tune(tuned.train, seconds=0.05)
    assert line.startswith("loader tuned: ")
    assert tuned.train.threads in (1, 2)
    assert all(torch.equal(a, b) for a, (b, _) in zip(expected, tuned.train.epoch(3), strict=True))


def test_waiting_for_data_is_said_once(
    folder: Path, open_loaders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalesnn.data.loader._WAIT_BATCHES", 5)
    hungry = open_loaders(folder)
    for epoch in range(3):
        for _ in hungry.train.epoch(epoch):
            pass
    assert len(hungry.train.notices) == 1
    assert "waits for data" in hungry.train.notices[0]
    assert "--workers (now 1)" in hungry.train.notices[0]
    busy = open_loaders(folder)
    for number in range(100):
        busy.train._count_wait(number, waited=0.004, worked=0.1)
    assert not busy.train.notices


def test_memory_does_not_grow_with_epochs(open_loaders: Any) -> None:
    import psutil

    size = ("--train-crop-size", "28", "--val-resize-size", "28", "--val-crop-size", "28")
    data = open_loaders(None, *size, batch_size=128)
    resident = []
    for epoch in range(4):
        for _ in data.train.epoch(epoch):
            pass
        for _ in data.val.epoch(epoch):
            pass
        resident.append(psutil.Process().memory_info().rss / 2**20)
    assert resident[-1] - resident[0] < 50, resident


# -- one level too high or too low


def images_in(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 40)).save(root / folder / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("folders", "path", "message"),
    [
        (
            ["train/all/a", "train/all/b", "val/all/a"],
            "",
            "one class only, all, .*the folders a, b: if those",
        ),
        (["train/a", "val/a"], "", "one class only, a, so there is nothing to tell apart$"),
        (
            ["train/train/a", "train/val/a", "val/x"],
            "",
            "splits for classes, train, val: is --data-path .*/train ",
        ),
        (["set/train/a", "set/train/b", "set/val/a"], "", "no folder .*: is --data-path .*/set meant"),
        (["train/a", "train/b", "val/a"], "train", "no folder .*/train/train: is --data-path .* meant"),
        (["a", "b"], "", "no folder .*/train: the data folder must hold"),
    ],
)
def test_a_folder_of_another_level_is_refused_with_the_folders_below(
    folders: list[str], path: str, message: str, tmp_path: Path, open_loaders: Any
) -> None:
    with pytest.raises(UserError, match=message):
        open_loaders(images_in(tmp_path, *folders) / path)


def test_classes_that_hold_folders_of_the_same_names_are_remarked_on(
    tmp_path: Path, open_loaders: Any
) -> None:
    years = [f"{split}/{year}/{name}" for split in ("train", "val") for year in (2012, 2013) for name in "ab"]
    data = open_loaders(images_in(tmp_path / "years", *years))
    assert "such as a, b: is DIR one level too high?" in " ".join(data.notices)
    videos = [
        f"{split}/{name}/{name}{video}" for split in ("train", "val") for name in "ab" for video in "12"
    ]
    data = open_loaders(images_in(tmp_path / "videos", *videos))
    assert "one level" not in " ".join(data.notices)


def test_shards_of_one_label_are_refused(tmp_path: Path, open_loaders: Any) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "s.tar", "w") as tar:
            for name, content in (("a.jpg", b"image"), ("a.cls", b"7")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="one class only: all 1 labels are 7"):
        open_loaders(tmp_path)
