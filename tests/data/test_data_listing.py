"""What a listing takes and what it leaves out: hidden entries, links, files beside the data."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scalesnn.base import UserError
from scalesnn.data.index import ImageIndex
from scalesnn.data.listing import STORED_INDEX, make_index, open_index, store_index
from scalesnn.data.shards import find_shards


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A split with two images in class a, one of them in a subfolder, and two in class b."""
    for name in ("a/1.jpg", "a/more/2.jpg", "b/3.jpg", "b/4.jpg"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"image")
    return tmp_path / "train"


FILES = ["a/1.jpg", "a/more/2.jpg", "b/3.jpg", "b/4.jpg"]


def said(index: ImageIndex) -> str:
    return " ".join(index.left_out)


def test_a_plain_folder_leaves_nothing_out(root: Path) -> None:
    index = make_index(root)
    assert index.files == FILES
    assert index.left_out == []


@pytest.mark.parametrize(
    "name",
    [
        "a/.ipynb_checkpoints/1-checkpoint.jpg",
        "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
        "a/._1.jpg",
        "b/Thumbs.db",
        "b/desktop.ini",
        "@eaDir/a.jpg",
        ".ipynb_checkpoints/x.jpg",
        "__MACOSX/a/._1.jpg",
        "b/more/.DS_Store",
    ],
)
def test_hidden_and_system_entries_are_skipped_counted_and_named(name: str, root: Path) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"rubbish")
    index = make_index(root)
    assert index.files == FILES
    assert index.classes == ["a", "b"]
    assert "1 hidden or system entries" in said(index)


@pytest.mark.parametrize("target", ["a", "", "..", "b", "a/more"])
def test_links_to_folders_that_are_listed_anyway_count_nothing_twice(target: str, root: Path) -> None:
    for number in range(3):
        os.symlink(root / target, root / "a" / f"again{number}")
    index = make_index(root)
    assert index.files == FILES
    assert "3 folders that are listed elsewhere already (a/again0, a/again1, a/again2)" in said(index)


def test_a_link_to_another_disk_is_followed_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "9.jpg").touch()
    os.symlink(tmp_path / "disk", tmp_path / "disk" / "deep" / "up")
    for place in ("a/x", "a/y", "b/x"):
        os.symlink(tmp_path / "disk", root / place)
    index = make_index(root)
    assert index.files == ["a/1.jpg", "a/more/2.jpg", "a/x/deep/9.jpg", "b/3.jpg", "b/4.jpg"]
    assert "3 folders that are listed elsewhere already" in said(index)


def test_class_folders_may_be_links_but_not_to_one_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pool" / "cat").mkdir(parents=True)
    (tmp_path / "pool" / "cat" / "1.jpg").touch()
    os.symlink(tmp_path / "pool" / "cat", root / "cat")
    os.symlink(root, root / "everything")
    index = make_index(root)
    assert Counter(index.classes[label] for label in index.labels) == {"a": 2, "b": 2, "cat": 1}
    os.symlink(tmp_path / "pool" / "cat", root / "kitten")
    with pytest.raises(UserError, match="cat and kitten are the same folder"):
        make_index(root)


def test_other_files_are_counted_and_named(root: Path) -> None:
    for name in ("a/notes.txt", "a/x.gif", "loose.jpg", "a/more/5.heic", "b/6.jpg.part"):
        (root / name).touch()
    os.mkfifo(root / "b" / "7.jpg")  # reading it would hang
    os.symlink("itself", root / "itself")
    index = make_index(root)
    assert index.files == FILES
    assert "2 files beside the class folders (itself, loose.jpg)" in said(index)
    assert "5 files of another kind (" in said(index)
    assert "…" in said(index)


def test_files_come_in_torchvisions_order(root: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in ("a/B/1.jpg", "a/b/1.jpg", "a/a.jpg", "a/more/deep/1.JPG", "a/Z.jpeg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    expected = [os.path.relpath(path, root) for path, _ in ImageFolder(root).samples]
    assert make_index(root).files == expected


def test_a_folder_that_cannot_be_listed_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="a/more cannot be listed: Permission denied"):
        make_index(root)


def test_archives_of_the_classes_may_lie_beside_the_class_folders(root: Path) -> None:
    with tarfile.open(root / "a.tar", "w") as tar:
        tar.add(root / "a" / "1.jpg", "1.jpg")
    (root / "split-1-of-2").write_text("hello")
    assert find_shards(root) is not None
    index = make_index(root)
    assert index.files == FILES
    assert "2 files beside the class folders (a.tar, split-1-of-2)" in said(index)
    (root / "a.tar").rename(root / "part.tar")
    with pytest.raises(UserError, match=r"both class folders with images .* part\.tar"):
        make_index(root)


def stored_and_now(root: Path) -> tuple[list[Any], list[Any]]:
    """Names and classes as the stored list has them, or what takes its place; and as they are."""
    indexes = open_index(root), make_index(root)
    kept, true = ([(n, i.classes[k]) for n, k in zip(i.names, i.labels, strict=True)] for i in indexes)
    assert indexes[0].left_out == indexes[1].left_out
    return kept, true


CHANGES = {
    "a file below the first level": lambda root: (root / "a/more/9.jpg").touch(),
    "a file removed there": lambda root: (root / "a/more/2.jpg").unlink(),
    "a file behind a link": lambda root: (root.parent / "disk/9.jpg").touch(),
    "a new class": lambda root: ((root / "c").mkdir(), (root / "c/9.jpg").touch()),
    "a class renamed": lambda root: (root / "a").rename(root / "z"),
    "a hidden entry": lambda root: (root / "b/.nfs1").touch(),
    "a file beside the classes": lambda root: (root / "notes.txt").touch(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stored_list_notices(change: str, root: Path) -> None:
    (root.parent / "disk").mkdir()
    (root.parent / "disk" / "8.jpg").touch()
    os.symlink(root.parent / "disk", root / "b" / "disk")
    store_index(make_index(root), root / STORED_INDEX)
    before, true = stored_and_now(root)
    assert before == true
    CHANGES[change](root)
    now, true = stored_and_now(root)
    assert now == true


def test_a_stored_list_is_read_and_not_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a" / "._1.jpg").touch()
    made = make_index(root)
    store_index(made, root / STORED_INDEX)
    monkeypatch.setattr("scalesnn.data.listing.make_index", None)
    stored = open_index(root)
    assert (stored.names, stored.left_out) == (made.names, made.left_out)


def shard(root: Path, labels: str) -> None:
    (root / "train").mkdir(exist_ok=True)
    with tarfile.open(root / "train" / "s.tar", "w") as tar:
        for number, label in enumerate(labels):
            for extension, data in (("jpg", b"image"), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_stored_list_notices_shards_with_other_labels_and_other_class_names(tmp_path: Path) -> None:
    root = tmp_path / "train"
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    shard(tmp_path, "0101")
    store_index(make_index(root), root / STORED_INDEX)
    shard(tmp_path, "1010")
    assert stored_and_now(root)[0] == stored_and_now(root)[1]
    assert list(open_index(root).labels) == [1, 0, 1, 0]
    store_index(make_index(root), root / STORED_INDEX)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert open_index(root).classes == ["cat", "dog"]
