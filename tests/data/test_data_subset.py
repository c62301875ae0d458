"""``scalesnn data subset``: which images, how they come there, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalesnn.base import UserError
from scalesnn.cli import main
from scalesnn.data.index import ImageIndex
from scalesnn.data.subset import choose_images, make_subset


def files_below(root: Path) -> dict[str, Path]:
    return {str(file.relative_to(root)): file for file in root.rglob("*") if file.is_file()}


def same_file(one: Path, other: Path) -> bool:
    return one.stat().st_ino == other.stat().st_ino


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of 7, 10 and 40 training images and 4 validation images each, one of them in a folder."""
    for split, counts in (("train", (7, 10, 40)), ("val", (4, 4, 4))):
        for name, count in zip(("ant", "bee", "cat"), counts, strict=True):
            for number in range(count):
                file = tmp_path / "images" / split / name / ("deep" if number == 3 else "") / f"{number}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(f"{split} {name} {number}".encode())
    return tmp_path / "images"


def test_a_share_of_each_class_is_linked_and_validation_is_whole(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (images / "train/bee/._1.jpg").write_bytes(b"what a desktop leaves")
    assert main(["data", "subset", "images", "some/small", "--fraction", "0.25", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "left out below images/train: 1 hidden or system entries (bee/._1.jpg)" in said
    assert "15 training and 12 validation images of 3 classes" in said
    assert "27 hard links" in said
    small = files_below(tmp_path / "some/small")
    listed = small.pop("subset.txt").read_text().splitlines()
    assert listed[0].startswith("# 1/4 of each class")
    assert sorted(listed[1:]) == sorted(small)
    counts = [
        len(list((tmp_path / "some/small/train" / name).rglob("*.jpg"))) for name in ("ant", "bee", "cat")
    ]
    assert counts == [2, 3, 10]  # rounded up
    assert all(same_file(file, images / name) for name, file in small.items())
    assert list((tmp_path / "some").iterdir()) == [tmp_path / "some/small"]


def test_the_choice_depends_on_names_and_seed_alone(images: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    names = [f"c{label}/{number}.jpg" for label in range(3) for number in range(50)]
    labels = np.repeat(np.arange(3), 50)

    def chosen(order: np.ndarray, seed: int, fraction: str = "1/10") -> list[str]:
        listed = [names[place] for place in order]
        return sorted(
            choose_images(
                ImageIndex(["c0", "c1", "c2"], labels[order], listed, tmp_path), Fraction(fraction), seed
            )
        )

    in_order = chosen(np.arange(150), seed=3)
    assert chosen(draw.permutation(150), seed=3) == in_order
    assert chosen(np.arange(150), seed=4) != in_order
    assert set(in_order) < set(chosen(np.arange(150), seed=3, fraction="0.2"))
    more = np.concatenate([np.arange(150), np.arange(50)])  # the images of class 0 twice as many: others stay
    assert {name for name in chosen(more, seed=3) if name[1] != "0"} == {
        name for name in in_order if name[1] != "0"
    }


def test_a_share_is_counted_exactly(images: Path, tmp_path: Path) -> None:
    index = ImageIndex(["c"], np.zeros(100), [f"c/{n}.jpg" for n in range(100)], tmp_path)
    assert len(choose_images(index, Fraction("0.07"), 0)) == 7  # 0.07 * 100 > 7 in floating point
    assert len(choose_images(index, Fraction("0.0700001"), 0)) == 8


def test_a_number_of_classes(images: Path, tmp_path: Path) -> None:
    make_subset(images, tmp_path / "two", Fraction(1), seed=1, classes=2)
    kept = sorted(folder.name for folder in (tmp_path / "two/train").iterdir())
    assert len(kept) == 2
    assert sorted(folder.name for folder in (tmp_path / "two/val").iterdir()) == kept
    others = set()
    for seed in range(8):
        make_subset(images, tmp_path / f"one-{seed}", Fraction("0.1"), seed=seed, classes=1)
        others |= {folder.name for folder in (tmp_path / f"one-{seed}/train").iterdir()}
    assert others == {"ant", "bee", "cat"}


def test_links_and_damaged_files(images: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.jpg").write_bytes(b"elsewhere")
    (images / "train/ant/link.jpg").symlink_to("../../../elsewhere.jpg")
    (images / "train/ant/gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"gone\.jpg is gone, .*data check"):
        make_subset(images, tmp_path / "small", Fraction(1), seed=0)
    assert not (tmp_path / "small").exists()
    assert list(tmp_path.glob(".*partial")) == []
    (images / "bad-images.txt").write_text("train/ant/gone.jpg\ta link that leads nowhere\n")
    make_subset(images, tmp_path / "small", Fraction(1), seed=0)
    assert same_file(tmp_path / "small/train/ant/link.jpg", tmp_path / "elsewhere.jpg")
    assert len(files_below(tmp_path / "small/train")) == 58


def test_files_are_copied_to_another_file_system(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system to copy from")
    source = memory / f"scalesnn-subset-{os.getpid()}"
    try:
        subprocess.run(["cp", "-r", str(images), str(source)], check=True)
        assert (
            main(["data", "subset", str(source), str(tmp_path / "small"), "--fraction", "1/2", "--quiet"])
            == 0
        )
        assert "0 hard links, 41 copies, because links" in capsys.readouterr().out
        for name, file in files_below(tmp_path / "small").items():
            assert name == "subset.txt" or file.read_bytes() == (source / name).read_bytes()
    finally:
        subprocess.run(["rm", "-rf", str(source)], check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images", "images/small", "--fraction", "0.5"], "images/small lies inside images"),
        (["images", "within/small", "--fraction", "0.5"], "within/small lies inside images"),
        (["images", "there", "--fraction", "0.5"], "there exists: name a new folder"),
        (["images", "dangling", "--fraction", "0.5"], "dangling exists"),
        (["missing", "small", "--fraction", "0.5"], "no folder missing"),
        (["images", "small", "--fraction", "0"], "above 0 and at most 1, got 0"),
        (["images", "small", "--fraction", "1.5"], "above 0 and at most 1, got 1.5"),
        (["images", "small", "--fraction", "1", "--classes", "4"], "between 1 and 3"),
        (["images", "small", "--fraction", "1", "--classes", "0"], "between 1 and 3"),
        (["shards", "small", "--fraction", "1"], "shards holds shards"),
        (["images", "file/small", "--fraction", "1"], "Not a directory; nothing was made"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "within").symlink_to("images/train")
    (tmp_path / "dangling").symlink_to("nowhere")
    if words[0] == "shards":
        assert main(["data", "pack", "images", "shards", "--quiet"]) == 0
    capsys.readouterr()
    before = files_below(tmp_path).keys()
    assert main(["data", "subset", *words, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert files_below(tmp_path).keys() == before


def test_a_fraction_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", "subset", "images", "small", "--fraction", "a/2"])
    assert "expected a number such as 0.03125 or 1/32" in capsys.readouterr().err


def _run(words: list[str]) -> None:
    raise SystemExit(main(words))


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for split, count in (("train", 10_000), ("val", 1)):
        for name in ("ant", "bee"):
            (source / split / name).mkdir(parents=True)
            for number in range(count):
                (source / split / name / f"{number}.jpg").touch()
    words = ["data", "subset", str(source), str(tmp_path / "small"), "--fraction", "1", "--quiet"]
    process = multiprocessing.get_context("fork").Process(target=_run, args=(words,))
    process.start()
    while process.is_alive() and not list(tmp_path.glob(".small.*/train/ant/*")):
        time.sleep(0.005)
    asked = time.monotonic()
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_a_subset_of_event_frames_trains_like_any_folder(tmp_path: Path, open_loaders: Any) -> None:
    for split, count in (("train", 8), ("val", 2)):
        for name in ("left", "right"):
            folder = tmp_path / "events" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                np.savez(folder / f"{number}.npz", frames=np.zeros((3, 2, 8, 8), np.uint8))
    make_subset(tmp_path / "events", tmp_path / "small", Fraction("0.3"), seed=0)
    data = open_loaders(tmp_path / "small")
    assert (len(data.train.index), len(data.val.index)) == (6, 4)
    assert data.frames_shape == (3, 2, 8, 8)
