"""``scalesnn data imagenet``: archives like the official ones, whole, cut and damaged."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import ImageNet, imagenet

from scalesnn.cli import main

WNIDS = ("n01440764", "n01443537", "n01484850")
TRAIN, VAL, DEVKIT = (imagenet.ARCHIVE_META[kind][0] for kind in ("train", "val", "devkit"))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return target.getvalue()


def devkit_of(val: list[int]) -> bytes:
    """A devkit whose ids are in another order than the WordNet ids, with one inner node of the hierarchy."""
    rows = [(3 - n, wnid, f"fish {n}, a fish", "", 0) for n, wnid in enumerate(WNIDS)] + [
        (4, "n99", "all", "", 3)
    ]
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    matrix = io.BytesIO()
    scipy.io.savemat(matrix, {"synsets": np.array(rows, kinds)})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = "".join(f"{number}\n" for number in val).encode()
    return tar_of(
        {f"{folder}/meta.mat": matrix.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth},
        "w:gz",
    )


def write_archives(root: Path, images: int = 5, size: int = 700) -> Path:
    draw = np.random.default_rng(0)
    root.mkdir(parents=True)
    classes = {
        f"{wnid}.tar": tar_of({f"{wnid}_{n}.JPEG": draw.bytes(size + n) for n in range(images)})
        for wnid in WNIDS
    }
    (root / TRAIN).write_bytes(tar_of(classes))
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": draw.bytes(300 + n) for n in (3, 1, 2, 4, 6, 5, 7)}
    (root / VAL).write_bytes(tar_of(val))
    (root / DEVKIT).write_bytes(devkit_of([1, 2, 3, 3, 2, 1, 1]))
    return root


def tree(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.md5(file.read_bytes()).hexdigest()
        for split in ("train", "val")
        for file in sorted((root / split).rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    return write_archives(tmp_path / "archives")


def test_the_layout_is_the_one_that_torchvision_makes(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(archives, theirs)
    assert main(["data", "imagenet", str(archives), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert f"{archives}/train: 15 images of 3 classes\n" in said
    assert f"{archives}/val: 7 images of 3 classes\n" in said
    assert "another checksum than the official" in said
    for kind, (name, _) in list(imagenet.ARCHIVE_META.items()):
        checksum = hashlib.md5((archives / name).read_bytes()).hexdigest()
        monkeypatch.setitem(imagenet.ARCHIVE_META, kind, (name, checksum))
    for split in ("train", "val"):
        dataset = ImageNet(str(theirs), split)
        assert ImageNet(str(archives), split).wnids == dataset.wnids == list(WNIDS)
    assert tree(archives) == tree(theirs)
    assert len(tree(archives)) == 22
    assert sorted(entry.name for entry in archives.iterdir()) == sorted(
        ["train", "val", "meta.bin", TRAIN, VAL, DEVKIT]
    )


def test_a_second_run_writes_nothing_and_mends_what_is_missing(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "imagenet", str(archives), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 0
    whole = tree(tmp_path / "out")
    file = tmp_path / "out/train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "out/val" / WNIDS[0] / "ILSVRC2012_val_00000003.JPEG").unlink()
    other = tmp_path / "out/train" / WNIDS[1] / f"{WNIDS[1]}_3.JPEG"
    written = other.stat().st_mtime_ns
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "15 images of 3 classes; 14 were there" in said
    assert "7 images of 3 classes; 6 were there" in said
    assert tree(tmp_path / "out") == whole
    assert other.stat().st_mtime_ns == written


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_goes_on(sent: signal.Signals, archives: Path, tmp_path: Path) -> None:
    words = ["data", "imagenet", str(archives), "--quiet", "-j", "1"]
    blocked = archives / ".train.partial" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    blocked.parent.mkdir(parents=True)
    os.mkfifo(blocked)  # writing waits for somebody to read
    process = multiprocessing.get_context("fork").Process(target=_run, args=(words,))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(blocked.parent.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, sent)
    if sent == signal.SIGTERM:  # ends after the image that is being written
        time.sleep(1)
        os.close(os.open(blocked, os.O_RDONLY | os.O_NONBLOCK))
    process.join(30)
    assert process.exitcode == (128 + sent if sent == signal.SIGTERM else -sent)
    assert not (archives / "train").exists()
    assert len(list((archives / ".train.partial").rglob("*.JPEG"))) == 8
    blocked.unlink()
    assert main(words) == 0
    assert not (archives / ".train.partial").exists()
    assert main([*words[:3], "--output", str(tmp_path / "anew"), "--quiet"]) == 0
    assert tree(archives) == tree(tmp_path / "anew")
    assert len(tree(archives)) == 22


def _run(words: list[str]) -> None:
    raise SystemExit(main(words))


def cut(file: Path, share: float) -> None:
    with open(file, "r+b") as opened:
        opened.truncate(int(file.stat().st_size * share))


DAMAGES: dict[str, tuple[Any, str]] = {
    "nothing": (
        lambda root: [file.unlink() for file in root.iterdir()],
        "holds neither ILSVRC2012_img_train.tar",
    ),
    "no devkit": (lambda root: (root / DEVKIT).unlink(), "has no ILSVRC2012_devkit_t12.tar.gz"),
    "cut train": (lambda root: cut(root / TRAIN, 0.5), "train.tar is damaged"),
    "cut val": (lambda root: cut(root / VAL, 0.5), "val.tar is damaged"),
    "cut devkit": (lambda root: cut(root / DEVKIT, 0.5), "is damaged or is not the devkit"),
    "no archive": (lambda root: (root / TRAIN).write_bytes(b"<html>" * 999), "train.tar is damaged"),
    "empty": (lambda root: (root / TRAIN).write_bytes(b""), "train.tar is damaged"),
    "another devkit": (
        lambda root: (root / DEVKIT).write_bytes(devkit_of([1, 2])),
        "7 images, but the devkit",
    ),
    "images": (
        lambda root: (root / TRAIN).write_bytes(tar_of({"1.JPEG": b"x"})),
        "holds no archives of classes",
    ),
    "cut class": (
        lambda root: (root / TRAIN).write_bytes(tar_of({"n1.tar": tar_of({"1.JPEG": bytes(2000)})[:1500]})),
        "train.tar is damaged",
    ),
    "a file": (lambda root: (root / ".train.partial").write_text(""), "the same command goes on"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_unpacked_is_named(
    damage: str, archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = DAMAGES[damage]
    make(archives)
    assert main(["data", "imagenet", str(archives), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert damage == "cut val" or damage == "another devkit" or not (archives / "train").exists()
    assert not (archives / "val").exists()


def test_one_split_alone_is_unpacked_and_the_other_named(
    archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (archives / VAL).unlink()
    (archives / DEVKIT).unlink()
    assert main(["data", "imagenet", str(archives), "--quiet"]) == 0
    assert "ILSVRC2012_img_val.tar is not in" in capsys.readouterr().out
    assert main(["data", "imagenet", str(archives / "nowhere")]) == 2
