"""Shards as people make them: every image counts once with its own label, or is refused or named."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from scalesnn.base import UserError
from scalesnn.data.index import ImageIndex
from scalesnn.data.labels import class_number
from scalesnn.data.listing import make_index


def write(target: Path, members: list[Any], mode: str = "w") -> Path:
    """A tar of (name, bytes or text), or of TarInfos for members without bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return target


def link(name: str, target: str, hard: bool = True) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.LNKTYPE if hard else tarfile.SYMTYPE, target
    return info


def content(index: ImageIndex) -> list[tuple[str, str]]:
    """Bytes and class of each image."""
    pairs = [(index.read(i).decode(), index.classes[index.labels[i]]) for i in range(len(index))]
    index.close()
    return pairs


TWO = [("1", "4"), ("2", "5")]
GOOD = [("x.jpg", "X"), ("x.cls", "0"), ("y.jpg", "Y"), ("y.cls", "1")]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.b.jpg", "1"), ("a.b.cls", "4"), ("a.c.jpg", "2"), ("a.c.cls", "5")], TWO),
        ([("v.1/a.jpg", "1"), ("v.1/a.cls", "4"), ("v.2/a.jpg", "2"), ("v.2/a.cls", "5")], TWO),
        ([("a.left.jpg", "1"), ("a.cls", "4")], [("1", "4")]),
        ([("a.jpg", "1"), ("a.cls", "4"), ("a.jpg", "2"), ("a.cls", "5")], TWO),
        ([("./a.jpg", "1"), ("a.json", '{"label": 4.0, "x": null}')], [("1", "4")]),
        ([("a.jpg", "1"), ("a.json", '{"caption": "cat"}'), ("a.cls", "4\n")], [("1", "4")]),
        ([("a.jpg", "1"), ("a.cls", "4"), link("b.jpg", "a.jpg"), ("b.cls", "5")], [("1", "4"), ("1", "5")]),
        (
            [link("d/b.jpg", "../a.png", False), ("a.png", "1"), ("a.cls", "4"), link("d/b.cls", "a.cls")],
            [("1", "4"), ("1", "4")],
        ),
    ],
    ids=["dots", "folders_with_dots", "field", "equal_keys", "json", "two_labels", "hard_link", "links"],
)
def test_every_member_with_a_label_counts(
    members: list[Any], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    write(tmp_path / "train" / "s.tar", members)
    index = make_index(tmp_path / "train")
    assert content(index) == expected
    assert index.left_out == []


def test_tars_that_were_joined_count_whole(tmp_path: Path) -> None:
    one = write(tmp_path / "one.tar", GOOD).read_bytes()
    other = write(tmp_path / "other.tar", [("z.jpg", "Z"), ("z.cls", "2")]).read_bytes()
    shard = tmp_path / "train" / "s.tar"
    shard.parent.mkdir()
    shard.write_bytes(one + other + one + bytes(20480))
    assert content(make_index(shard.parent)) == [("X", "0"), ("Y", "1"), ("Z", "2"), ("X", "0"), ("Y", "1")]
    shard.write_bytes(one + b"garbage")
    with pytest.raises(UserError, match=r"s\.tar is damaged"):
        make_index(shard.parent)
    shard.write_bytes(one[:2048] + b"\xff" + one[2049:])  # a damaged header in the middle
    with pytest.raises(UserError, match=r"s\.tar is damaged"):
        make_index(shard.parent)


def test_what_a_tar_holds_besides_is_counted_and_named(tmp_path: Path) -> None:
    write(
        tmp_path / "train" / "s.tar",
        [
            *GOOD,
            ("x.mask.png", "M"),
            ("._x.jpg", "apple"),
            ("x.txt", "a caption"),
            ("lonely.cls", "3"),
            link("gone.jpg", "nowhere.jpg"),
        ],
    )
    (tmp_path / "train" / "README").touch()
    (tmp_path / "train" / "more").mkdir()
    (tmp_path / "train" / "s-2.tar.gz").touch()
    index = make_index(tmp_path / "train")
    assert content(index) == [("X", "0"), ("Y", "1")]
    (line,) = index.left_out
    for part in (
        "1 hidden or system entries (s.tar#._x.jpg)",
        "1 members that are neither image nor label (s.tar#x.txt)",
        "1 further images of a key (s.tar#x.mask.png)",
        "1 labels without an image (s.tar#lonely.cls)",
        "1 links that lead nowhere (s.tar#gone.jpg)",
        "2 other files beside the shards (README, s-2.tar.gz)",
        "1 folders beside the shards (more)",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", "1"), ("a.png", "2"), ("a.cls", "0")], "2 images for 1 label of a (a.jpg, a.png)"),
        ([("a.jpg", "1"), ("b.cls", "0")], "a.jpg has no label"),
        ([("a.jpg", "1"), ("a.json", "[1]")], 'a.json has no "label"'),
        ([("a.jpg", "1"), ("a.json", "{1")], "a.json is not JSON"),
        ([("a.jpg", "1"), ("a.json", "[" * 100_000)], "a.json is not JSON"),
        *(
            ([("a.jpg", "1"), ("a.json", json.dumps({"label": label}))], "a.json: a label must be a whole")
            for label in (None, [1], {"id": 1}, -1, 0.7, True, 10**30, "cat", float("nan"), float("inf"))
        ),
        *(
            ([("a.jpg", "1"), ("a.cls", label)], "a.cls: a label must be a whole number")
            for label in ("cat", "", "-1", "0.7", "9" * 9999, "1 2", b"\xff", "1_0", "٣")
        ),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused_by_name(
    members: list[Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "train" / "s.tar", [*GOOD, *members])
    with pytest.raises(UserError) as refused:
        make_index(tmp_path / "train")
    assert message in str(refused.value)
    assert "s.tar: " in str(refused.value)
    assert len(str(refused.value)) < 400


def test_class_numbers() -> None:
    for label in (7, 7.0, "7", " 7\n", b"7", "7.0", "007", "+7"):
        assert class_number(label, "here") == 7
    assert class_number(2**63 - 1, "here") == 2**63 - 1


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar"])
def test_compressed_tars_are_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    write(tmp_path / "train" / name, GOOD, "w:gz")
    with pytest.raises(UserError, match=r"compressed.*uncompress it"):
        make_index(tmp_path / "train")


def test_a_compressed_tfrecord_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001").write_bytes(gzip.compress(bytes(4000), mtime=0))
    with pytest.raises(UserError, match=r"compressed.*uncompress it"):
        make_index(tmp_path)


def record(image: bytes, label: float, flag: int = 0) -> bytes:
    data = struct.pack("<IfQQ", flag, label, 0, 0) + bytes(4 * flag) + image
    return struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4)


def test_records_without_an_image_or_in_parts_are_counted_and_odd_labels_refused(tmp_path: Path) -> None:
    shard = tmp_path / "s.rec"
    parts = b"".join(struct.pack("<II", 0xCED7230A, part << 29 | 4) + b"part" for part in (1, 2, 3))
    shard.write_bytes(record(b"", 10.0, flag=2) + record(b"X", 1.0) + parts + record(b"Y", 0.0))
    index = make_index(tmp_path)
    assert content(index) == [("X", "1"), ("Y", "0")]
    assert index.names == ["1", "3"]
    assert "1 records without an image (s.rec#0)" in index.left_out[0]
    assert "1 records that are stored in parts (s.rec#2)" in index.left_out[0]
    for label in (0.7, -1.0, float("nan"), 1e30):
        shard.write_bytes(record(b"X", 1.0) + record(b"Y", label))
        with pytest.raises(UserError, match="record 1: a label must be a whole number"):
            make_index(tmp_path)
