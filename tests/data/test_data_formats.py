"""Shards, stored lists and event frames: the same images in the same order, wherever the bytes lie."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import resource
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import DatasetFolder

from scalesnn.base import UserError
from scalesnn.data.commands import add_data_command
from scalesnn.data.layout import find_layout, open_splits
from scalesnn.data.listing import STORED_INDEX, open_index

PLAIN = ("--mixup-alpha", "0", "--cutmix-alpha", "0")


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_data_command(parser.add_subparsers())
    args = parser.parse_args(["data", *words])
    return args.run(args)


def shown(loader: Any) -> list[tuple[str, int]]:
    """Digest and label of every image of an epoch, sorted."""
    found = []
    for images, labels in loader.epoch(0):
        found += [
            (hashlib.md5(image.numpy().tobytes()).hexdigest(), int(label))
            for image, label in zip(images, labels, strict=True)
        ]
    return sorted(found)


# -- writers of the formats, from their descriptions, for these tests only


def varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(image: bytes, label: int, packed: bool) -> bytes:
    integers = field(1, varint(label)) if packed else varint(1 << 3) + varint(label)
    features = {
        "image/filename": field(1, field(1, b"some name")),
        "image/encoded": field(1, field(1, image)),
        "image/height": field(3, field(1, varint(375))),
        "image/class/label": field(3, integers),
    }
    return field(
        1, b"".join(field(1, field(1, key.encode()) + field(2, value)) for key, value in features.items())
    )


def write_tfrecord(target: Path, items: list[tuple[bytes, int]], with_index: bool) -> None:
    places = []
    with open(target, "wb") as file:
        for number, (image, label) in enumerate(items):
            record = example(image, label, packed=bool(number % 2))
            places.append(f"{file.tell()} {len(record) + 16}\n")
            file.write(struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4))
    if with_index:
        Path(f"{target}.idx").write_text("".join(places))


def write_recordio(target: Path, items: list[tuple[bytes, int]]) -> None:
    with open(target, "wb") as file:
        for number, (image, label) in enumerate(items):
            several = number % 3 == 2
            header = struct.pack("<IfQQ", 2 if several else 0, 0.0 if several else float(label), number, 0)
            record = header + (struct.pack("<ff", label, 9.0) if several else b"") + image
            file.write(struct.pack("<II", 0xCED7230A, len(record)) + record + bytes(-len(record) % 4))


def write_tar(target: Path, items: list[tuple[bytes, int]]) -> None:
    with tarfile.open(target, "w") as tar:
        for number, (image, label) in enumerate(items):
            labelled = (
                ("cls", str(label)) if number % 2 else ("json", json.dumps({"label": label, "url": "none"}))
            )
            for extension, data in (("jpg", image), (labelled[0], labelled[1].encode())):
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


WRITERS: dict[str, Callable[[Path, list[tuple[bytes, int]]], None]] = {
    "part-{}.tar": write_tar,
    "train-{:05d}-of-00002": lambda target, items: write_tfrecord(target, items, with_index=True),
    "part-{}.tfrecord": lambda target, items: write_tfrecord(target, items, with_index=False),
    "part-{}.rec": write_recordio,
}


@pytest.fixture(params=WRITERS, ids=["tar", "tfrecord_with_index", "tfrecord", "recordio"])
def shards(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    """The images of ``folder`` in two shards a split."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        index = open_index(folder / split)
        items = [(index.read(image), int(index.labels[image])) for image in range(len(index))]
        for part in (0, 1):
            target = tmp_path / split / request.param.format(part)
            WRITERS[request.param](target, items[len(items) * part // 2 : len(items) * (part + 1) // 2])
    return tmp_path


def test_shards_give_the_same_epochs_as_the_folder(shards: Path, folder: Path, open_loaders: Any) -> None:
    packed, plain = open_loaders(shards, *PLAIN), open_loaders(folder, *PLAIN)
    assert packed.classes == ["0", "1", "2"]
    assert shown(packed.train) == shown(plain.train)
    assert shown(packed.val) == shown(plain.val)
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_loaders(shards).classes == ["ant", "bee", "cat"]


def test_shards_may_be_read_by_worker_processes(shards: Path, folder: Path, open_loaders: Any) -> None:
    packed = open_loaders(shards, *PLAIN, "--loader", "torchvision", "-j", "2")
    plain = open_loaders(folder, *PLAIN, "--loader", "torchvision", "-j", "0")
    assert shown(packed.val) == shown(plain.val)


def test_a_shard_that_is_cut_off_is_refused_by_name(shards: Path, open_loaders: Any) -> None:
    shard = sorted(file for file in (shards / "train").iterdir() if file.suffix != ".idx")[1]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size * 2 // 3)
    with pytest.raises(UserError, match=shard.name):
        open_loaders(shards)


def test_a_shard_that_is_cut_off_during_the_run_costs_only_its_images(
    shards: Path, open_loaders: Any
) -> None:
    data = open_loaders(shards, *PLAIN)
    shard = sorted(file for file in (shards / "train").iterdir() if file.suffix != ".idx")[1]
    with open(shard, "r+b") as file:
        file.truncate(int(data.train.index.offset[-2]) + 100)
    assert sum(len(images) for epoch in (0, 1) for images, _ in data.train.epoch(epoch)) == 120
    assert set(data.train.bad.reasons) == {59, 60}
    assert all(f"{shard}#" in data.train.index.path(image) for image in data.train.bad.reasons)


def test_pack_makes_shards_that_train_like_the_folder(
    folder: Path, tmp_path: Path, open_loaders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "packed"
    assert command("pack", str(folder), str(target), "--shard-size", "1", "--quiet") == 0
    assert "61 images in 1 shards" in capsys.readouterr().out
    packed, plain = open_loaders(target, *PLAIN), open_loaders(folder, *PLAIN)
    assert packed.classes == plain.classes
    assert shown(packed.val) == shown(plain.val)
    assert len(packed.train.index) == 61
    with pytest.raises(UserError, match="not empty"):
        command("pack", str(folder), str(target), "--quiet")


def test_pack_keeps_class_names_of_any_bytes(tmp_path: Path, make_folder: Any) -> None:
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"a\x0cb", b"line\xe2\x80\xa8end")]
    root = make_folder(tmp_path / "images", 6, 3)
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (root / split / f"class_{number}").rename(root / split / name)
    assert command("index", str(root)) == 0
    assert command("pack", str(root), str(tmp_path / "packed"), "--quiet") == 0
    assert open_index(tmp_path / "packed" / "train").classes == sorted(names)
    for split in ("train", "val"):
        (root / split / names[0]).rename(root / split / "two\nlines")
    with pytest.raises(UserError, match="cannot hold the class name"):
        command("pack", str(root), str(tmp_path / "again"), "--quiet")


def test_large_data_are_packed_into_several_shards(folder: Path, tmp_path: Path) -> None:
    from scalesnn.data.loader import BadImages
    from scalesnn.data.pack import pack_split

    index = open_index(folder / "train")
    assert pack_split(BadImages(index, skip=True), tmp_path / "train", shard_bytes=20_000) > 2
    packed = open_index(tmp_path / "train")
    assert sorted(map(packed.read, range(61))) == sorted(map(index.read, range(61)))


def test_a_stored_list_is_used_until_the_folder_changes(
    tmp_path: Path, make_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path, 9, 3)
    assert command("index", str(root)) == 0
    made = open_index(root / "train")

    def walk_again(*_: Any) -> None:
        raise AssertionError("the folder was listed again")

    monkeypatch.setattr("scalesnn.data.listing.make_index", walk_again)
    stored = open_index(root / "train")
    assert stored.files == made.files
    assert stored.fingerprint() == made.fingerprint()
    new = root / "train" / "class_0" / "new.jpg"
    new.write_bytes((root / "train" / made.files[0]).read_bytes())
    with pytest.raises(AssertionError, match="listed again"):
        open_index(root / "train")


def test_cache_dataset_keeps_the_list_beside_the_run(
    folder: Path, tmp_path: Path, open_loaders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_loaders(folder, "--cache-dataset", output_dir=str(tmp_path))
    assert len(list((tmp_path / "data-index").glob("*.npz"))) == 2
    assert not (folder / "train" / STORED_INDEX).exists()
    monkeypatch.setattr("scalesnn.data.listing.make_index", None)
    again = open_loaders(folder, "--cache-dataset", output_dir=str(tmp_path))
    assert again.fingerprint == first.fingerprint
    assert again.val.index.files == first.val.index.files


def test_a_damaged_stored_list_is_made_anew(tmp_path: Path, make_folder: Any) -> None:
    root = make_folder(tmp_path, 6, 3)
    (root / "train" / STORED_INDEX).write_bytes(b"PK\x03\x04 not really")
    assert len(open_index(root / "train")) == 6


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, make_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path, 6, 3)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(UserError, match="--cache-dataset"):
        command("index", str(root))


@pytest.mark.parametrize("index", ["short", "of_another_shard", "empty", "text"])
def test_an_index_file_that_does_not_fit_is_not_used(index: str, tmp_path: Path) -> None:
    items = [(b"image %d" % number, number % 3) for number in range(8)]
    shard = tmp_path / "train-00000-of-00001"
    write_tfrecord(shard, items, with_index=True)
    idx = Path(f"{shard}.idx")
    assert open_index(tmp_path).left_out == []
    lines = idx.read_text().splitlines(keepends=True)
    other = [f"{int(start) + 8} {size}\n" for start, size in map(str.split, lines)]
    idx.write_text(
        "".join({"short": lines[:4], "of_another_shard": other, "text": ["hello\n"]}.get(index, []))
    )
    found = open_index(tmp_path)
    assert [(found.read(image), found.labels[image]) for image in range(len(found))] == items
    assert f"1 index files that do not fit their shard ({idx.name})" in found.left_out[0]


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(400):
        write_tar(tmp_path / "train" / f"{number:03d}.tar", [(f"image {number}".encode(), number % 2)])
    index = open_index(tmp_path / "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 300, hard))
    try:
        for _ in range(2):
            assert [index.read(image) for image in range(400)] == [f"image {n}".encode() for n in range(400)]
    finally:
        index.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- event frames


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """21 training and 8 validation arrays [5, 2, 12, 10] of two classes, .npy and .npz."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 21), ("val", 8)):
        for number in range(count):
            folder = tmp_path / split / f"gesture_{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            events = draw.poisson(0.7, (5, 2, 12, 10)).astype(np.float32 if number % 3 else np.uint8)
            if number % 2:
                np.save(folder / f"{number}.npy", events)
            else:
                np.savez_compressed(folder / f"{number}.npz", frames=events)
    return tmp_path


def test_frames_come_as_they_are_with_their_own_time_steps(frames: Path, open_loaders: Any) -> None:
    data = open_loaders(frames, *PLAIN, batch_size=3)
    assert data.frames_shape == (5, 2, 12, 10)
    assert "event frames" in " ".join(data.notices)
    seen = 0
    for number, (images, labels) in enumerate(data.val.epoch(0)):
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = data.val.index.names[data.val.keys(0, number).images[row]]
            stored = np.load(frames / "val" / name)
            expected = stored["frames"] if name.endswith("npz") else stored
            assert np.array_equal(image.numpy(), expected.astype(np.float32))
            assert name.startswith(f"gesture_{label}/")
            seen += 1
    assert seen == 8


def test_frames_resume_on_other_ranks_and_erase_all_time_steps_alike(frames: Path, open_loaders: Any) -> None:
    flags = ("--random-erase", "1")
    alone = open_loaders(frames, *flags, batch_size=4)
    whole = {}
    for number, (images, targets) in enumerate(alone.train.epoch(2)):
        for position, image, target in zip(
            alone.train.keys(2, number).positions.tolist(), images, targets, strict=True
        ):
            whole[position] = (image, target)
    plain = open_loaders(frames, *PLAIN, "--random-erase", "1", batch_size=4)
    image = next(plain.train.epoch(2))[0]
    assert ((image == 0).all(dim=(1, 2)).sum(dim=(1, 2)) >= 0.02 * 120 - 1).all()
    for rank in (0, 1):
        part = open_loaders(frames, *flags, batch_size=2, rank=rank, world_size=2)
        for number, (images, targets) in enumerate(part.train.epoch(2, start=1), start=1):
            for position, image, target in zip(
                part.train.keys(2, number).positions.tolist(), images, targets, strict=True
            ):
                assert torch.equal(image, whole[position][0])
                assert torch.equal(target, whole[position][1])


@pytest.mark.parametrize("damage", ["empty", "text", "shape", "objects"])
def test_bad_frames_are_replaced(damage: str, frames: Path, open_loaders: Any) -> None:
    data = open_loaders(frames, *PLAIN, batch_size=3)
    file = frames / "train" / "gesture_1" / "7.npy"
    if damage in ("empty", "text"):
        file.write_bytes(b"" if damage == "empty" else b"no array")
    else:
        array = np.zeros((4, 2, 12, 10)) if damage == "shape" else np.array([None, {}], object)
        np.save(file, array, allow_pickle=True)
    assert sum(len(images) for images, _ in data.train.epoch(0)) == 21
    assert [data.train.index.names[image] for image in data.train.bad.reasons] == ["gesture_1/7.npy"]
    assert command("check", str(frames), "--quiet") == (0 if damage == "shape" else 1)


def test_unsplit_frames_are_split_as_spikingjelly_does_it(tmp_path: Path) -> None:
    # spikingjelly.datasets itself imports torchaudio, which need not fit the torch that is here
    found = importlib.util.find_spec("spikingjelly")
    if found is None or found.origin is None:
        pytest.skip("spikingjelly is not installed")
    source = Path(found.origin).parent / "datasets" / "utils.py"
    spec = importlib.util.spec_from_file_location("spikingjelly.no_datasets.utils", source)
    assert spec is not None
    assert spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    for name, count in (("a", 10), ("b", 25), ("c", 41)):
        (tmp_path / name).mkdir()
        for number in range(count):
            np.savez(tmp_path / name / f"{name}_{number}.npz", frames=np.zeros((1, 2, 4, 4), np.uint8))
    theirs = DatasetFolder(str(tmp_path), loader=lambda path: path, extensions=(".npz",))
    expected = utils.split_to_train_test_set(0.9, theirs, 3)
    for index, subset in zip(open_splits(find_layout(tmp_path)), expected, strict=True):
        assert [index.path(image) for image in range(len(index))] == [
            subset[i][0] for i in range(len(subset))
        ]
    assert command("check", str(tmp_path), "--quiet") == 0
    assert command("index", str(tmp_path)) == 0


def test_the_shape_comes_from_the_first_frames_that_can_be_read(frames: Path, open_loaders: Any) -> None:
    (frames / "train" / "gesture_0" / "0.npz").write_bytes(b"")
    data = open_loaders(frames, *PLAIN, batch_size=3)
    assert data.frames_shape == (5, 2, 12, 10)
    for file in (frames / "train").glob("*/*"):
        file.write_bytes(b"no array")
    with pytest.raises(UserError, match=r"no readable frames, the last .*gesture_1"):
        open_loaders(frames, *PLAIN)
