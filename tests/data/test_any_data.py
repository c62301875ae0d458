"""Whatever lies in a data folder: the commands take it, every image listed or named, or end with one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import struct
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from scalesnn.base import UserError
from scalesnn.data.check import inspect
from scalesnn.data.commands import add_data_command
from scalesnn.data.headers import BadImageError, decode_rgb
from scalesnn.data.index import ImageIndex
from scalesnn.data.listing import make_index, open_index, read_bad_list
from scalesnn.data.shards import CLASSES_FILE, read_classes
from scalesnn.data.tars import walk_tar
from scalesnn.data.walking import LeftOut, is_hidden

QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def encoded(kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    Image.effect_noise((9, 7), 60).convert("RGB").save(target, kind, **options)
    return target.getvalue()


IMAGES = [
    encoded("JPEG"),
    encoded("JPEG", progressive=True),
    encoded("PNG"),
    encoded("WEBP"),
    encoded("BMP"),
    encoded("TIFF"),
    encoded("TIFF", compression="tiff_lzw"),
    encoded("GIF"),
    b"P6\n2 1\n4095\n" + bytes(12),
]
GOOD = IMAGES[0]


@pytest.fixture
def new(tmp_path: Path) -> Any:
    """A folder for each example."""

    @contextlib.contextmanager
    def made() -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            yield Path(folder)

    return made


def command(capsys: Any, *words: str) -> bool:
    """Whether `scalesnn data …` works; otherwise it raises UserError with one line. It prints whole lines."""
    parser = argparse.ArgumentParser()
    add_data_command(parser.add_subparsers())
    args = parser.parse_args(["data", *words])
    try:
        assert args.run(args) in (0, 1)
    except UserError as error:
        is_one_line(error)
        return False
    finally:
        printed = capsys.readouterr().out
        assert all(line.isprintable() for line in printed.split("\n")), printed
    return True


def is_one_line(error: UserError) -> None:
    assert str(error).isprintable()
    assert str(error)


def listed(split: Path) -> ImageIndex | None:
    """The index of a split; None where it is refused with one line."""
    try:
        return make_index(split)
    except UserError as error:
        is_one_line(error)
        return None


def pairs(index: ImageIndex) -> Counter[tuple[bytes, str]]:
    """The bytes and the class of each image that can be read."""
    found: Counter[tuple[bytes, str]] = Counter()
    for image in range(len(index)):
        with contextlib.suppress(OSError):
            found[index.read(image), index.classes[index.labels[image]]] += 1
    index.close()
    return found


def everything_works(capsys: Any, root: Path, target: Path) -> ImageIndex | None:
    """Index, check and pack the split train of ``root``; each image that is listed goes through all of
    them."""
    index = listed(root / "train")
    if index is None:
        assert not command(capsys, "index", str(root))
        assert not command(capsys, "check", str(root), "--quiet", "-j", "1")
        assert not command(capsys, "pack", str(root), str(target), "--quiet")
        return None
    bad = {index.path(image) for image in range(len(index)) if any(f.bad for f in inspect(index, image))}
    assert command(capsys, "check", str(root), "--quiet", "-j", "1")
    assert read_bad_list(root / "bad-images.txt", root) == bad
    assert len(index.without(bad)) == len(index) - len(bad)
    assert command(capsys, "index", str(root))
    stored = open_index(root / "train")
    assert (stored.names, stored.classes) == (index.names, index.classes)
    found = pairs(index)
    if command(capsys, "pack", str(root), str(target), "--quiet"):
        assert pairs(open_index(target / "train")) == found
        assert read_classes(target / CLASSES_FILE) == index.classes
    return index


def is_name(name: str) -> bool:
    """Whether a file may have it."""
    try:
        return bool(os.fsencode(name)) and name not in (".", "..") and not set(name) & set("/\0")
    except UnicodeEncodeError:  # half a surrogate pair
        return False


# Any name that a file may have: also bytes that are not UTF-8, and what a list of lines could stumble over.
FILE_NAMES = st.one_of(
    st.binary(min_size=1, max_size=12).map(os.fsdecode),
    st.text(max_size=8),
    st.text(alphabet='\t\n\r#" .a\\\u2028\x85é', min_size=1, max_size=5),
).filter(is_name)
ENTRIES = st.lists(
    st.tuples(FILE_NAMES, FILE_NAMES, st.sampled_from(["good", "empty", "text", "gone", "folder"])),
    min_size=1,
    max_size=5,
    unique_by=lambda entry: entry[:2],
)


@QUICK
@given(ENTRIES)
@example([("a\nb", "tab\tin it", "text"), ("c", "#1", "text")])
@example([("a", '"q"', "text"), ("a", " 1", "empty"), ("a", "1\u2028", "text"), ("b", "x", "gone")])
@example([("a", "x", "gone")])
@example([("\ufeffa", "x", "good"), ("b\udcff", "y\udcff", "text")])
@example([(".a", "x", "good")])
@example([("a", ".x", "good"), ("a", "y", "good")])
def test_class_folders_of_any_names(capsys: Any, new: Any, entries: list[tuple[str, str, str]]) -> None:
    with new() as root:
        drawn = []
        for number, (folder, name, kind) in enumerate(entries):
            (root / "train" / folder).mkdir(parents=True, exist_ok=True)
            path = root / "train" / folder / f"{name}.jpg"
            if os.path.lexists(path):
                continue
            drawn.append(path.relative_to(root / "train"))
            if kind == "gone":
                path.symlink_to("not there")
            elif kind == "folder":
                path.mkdir()
                (path / "inner.png").write_bytes(GOOD)
                drawn[-1] /= "inner.png"
            else:
                path.write_bytes({"good": GOOD + bytes([number]), "empty": b"", "text": b"no image"}[kind])
        index = everything_works(capsys, root, root / "packed")
        if index is not None:
            visible = {str(path) for path in drawn if not any(map(is_hidden, path.parts))}
            assert set(index.names) == visible
            assert bool(index.left_out) == (len(visible) < len(drawn))


LABELS = st.one_of(
    st.sampled_from(
        ["0", "1", " 2\n", "3.0", "-1", "0.7", "cat", "", "null", "9" * 40, "9223372036854775807"]
    ),
    st.integers().map(str),
    st.binary(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=4,
    ).map(json.dumps),
).map(lambda text: text if isinstance(text, bytes) else text.encode())
MEMBER_NAMES = st.one_of(
    st.sampled_from(["a", "b", "a.b", "x/a", ".a", "@eaDir/a", "//a", "../a", "a\tb", "#c\n", "\udcff"]),
    st.text(alphabet="ab./\n é\udcff", min_size=1, max_size=6),
)
KINDS = ["image", "image", "link", "hard", "folder", "device", "text"]
MEMBERS = st.lists(
    st.tuples(MEMBER_NAMES, st.sampled_from([".cls", ".json"]), LABELS, st.sampled_from(KINDS)), max_size=4
)


def tar_of(members: list[tuple[str, str, bytes, str]], form: int) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form, errors="surrogateescape") as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "a.jpg"
            tar.addfile(info, io.BytesIO(data))

        for number, (key, ending, label, kind) in enumerate(members):
            types = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
            types |= {"folder": tarfile.DIRTYPE, "device": tarfile.CHRTYPE}
            plain = kind not in types
            data = GOOD + bytes([number]) if plain else b""
            add(f"{key}.jpg" if kind != "text" else f"{key}.txt", data, types.get(kind, tarfile.REGTYPE))
            text = label if ending == ".cls" or label[:1] == b"{" else b'{"label": ' + label + b"}"
            add(key + ending, text)
    return target.getvalue()


@QUICK
@given(MEMBERS, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
@example([("a", ".cls", b"0", "image"), ("//b", ".cls", b"1", "image")], tarfile.GNU_FORMAT)
@example([("a", ".json", b"[" * 900 + b"]" * 900, "image")], tarfile.PAX_FORMAT)
@example([("a\tb", ".cls", b"0", "image"), ("c\nd", ".cls", b"0", "image")], tarfile.PAX_FORMAT)
@example([], tarfile.PAX_FORMAT)
def test_tars_of_any_members(capsys: Any, new: Any, members: Any, form: int) -> None:
    with new() as root:
        (root / "train").mkdir()
        (root / "train" / "0.tar").write_bytes(tar_of(members, form))
        index = everything_works(capsys, root, root / "packed")
        if index is not None:
            left_out = LeftOut()
            entries = list(walk_tar(root / "train" / "0.tar", left_out))
            assert len(entries) == len(index)
            others = ("labels without an image", "members that are neither image nor label")
            named = sum(count for reason, count in left_out.counts.items() if reason not in others)
            assert len(index) + named >= sum(kind not in ("folder", "text") for *_, kind in members)


DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)
CUT = st.one_of(st.just(1.0), st.floats(0, 1))


def damaged(data: bytes, damage: list[tuple[float, int]], cut: float) -> bytes:
    changed = bytearray(data)
    for place, value in damage:
        changed[int(place * len(changed))] = value
    return bytes(changed[: int(cut * len(changed))])


def varint(value: int) -> bytes:
    if value < 128:
        return bytes([value])
    return bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def tfrecord(labels: list[int], packed: bool = True) -> bytes:
    """Records of tf.train.Example; labels are stored as 64-bit two's complement."""
    result = b""
    for label in labels:
        number = varint(label & (1 << 64) - 1)
        integers = field(1, number) if packed else b"\x08" + number
        image = field(1, b"image/encoded") + field(2, field(1, field(1, GOOD)))
        klass = field(1, b"image/class/label") + field(2, field(3, integers))
        example = field(1, field(1, image) + field(1, klass))
        result += struct.pack("<QI", len(example), 0) + example + bytes(4)
    return result


def recordio(labels: list[float], flag: int = 0) -> bytes:
    result = b""
    for label in labels:
        data = struct.pack("<IfQQ", flag, label, 0, 0) + GOOD
        result += struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4)
    return result


TWO = [("a", ".cls", b"0", "image"), ("b", ".cls", b"1", "image")]
WHOLE = {
    "0.tar": tar_of(TWO, tarfile.PAX_FORMAT),
    "1.tar": tar_of([("é" * 90, ".cls", b"0", "image"), *TWO], tarfile.GNU_FORMAT),
    "0.tfrecord": tfrecord([0, 1]),
    "1.tfrecord": tfrecord([0, 1], packed=False),
    "0.rec": recordio([0, 1]),
}


def header_with_size(size: bytes) -> bytes:
    """A tar whose first header claims ``size``, with a right checksum."""
    header = bytearray(WHOLE["0.tar"][:512])
    header[124:136] = size
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + WHOLE["0.tar"][512:]


@QUICK
@given(st.sampled_from(sorted(WHOLE)), DAMAGE, CUT)
@example("0.tfrecord", [(20 / len(WHOLE["0.tfrecord"]), 255)], 1.0)
def test_damaged_shards(capsys: Any, new: Any, name: str, damage: Any, cut: float) -> None:
    with new() as root:
        (root / "train").mkdir()
        (root / "train" / name).write_bytes(damaged(WHOLE[name], damage, cut))
        everything_works(capsys, root, root / "packed")


LONG_CHAIN = b"".join(
    tarfile.TarInfo._create_header(  # type: ignore[attr-defined]
        {"name": "././@LongLink", "type": b"L", "size": 1}, tarfile.GNU_FORMAT, "utf-8", "strict"
    )
    + b"a".ljust(512, b"\0")
    for _ in range(1500)
)


@pytest.mark.parametrize(
    "data",
    [
        header_with_size(b"\xff" * 11 + b"\0"),  # a negative number in base 256: back to this header for ever
        header_with_size(b"\x80" + bytes(3) + b"\x7f" * 8),
        LONG_CHAIN,
    ],
    ids=["negative", "enormous", "chain"],
)
def test_tars_whose_headers_lie(capsys: Any, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(data)
    assert everything_works(capsys, tmp_path, tmp_path / "packed") is None


@pytest.mark.parametrize(
    "integers",
    [
        field(1, b""),
        b"\x08" + b"\xff" * 12 + b"\x01",
        field(1, b"\xff" * 12 + b"\x01"),
        varint(1 << 3 | 2) + varint(1 << 68) + b"\x01",
        varint(1 << 3 | 5) + bytes(4),
    ],
    ids=["no_number", "long", "long_packed", "past_the_end", "of_another_kind"],
)
def test_a_tfrecord_whose_label_is_no_number(capsys: Any, tmp_path: Path, integers: bytes) -> None:
    image = field(1, b"image/encoded") + field(2, field(1, field(1, GOOD)))
    klass = field(1, b"image/class/label") + field(2, field(3, integers))
    example = field(1, field(1, klass) + field(1, image))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tfrecord").write_bytes(struct.pack("<QI", len(example), 0) + example + bytes(4))
    assert everything_works(capsys, tmp_path, tmp_path / "packed") is None


@QUICK
@given(st.lists(st.one_of(st.integers(-2, 3), st.integers(-(2**63), 2**63 - 1)), max_size=3), st.booleans())
def test_tfrecords_of_any_labels(capsys: Any, new: Any, labels: list[int], packed: bool) -> None:
    with new() as root:
        (root / "train").mkdir()
        (root / "train" / "0.tfrecord").write_bytes(tfrecord(labels, packed))
        index = everything_works(capsys, root, root / "packed")
        assert (index is not None) == (len(labels) > 0 and min(labels) >= 0)
        if index is not None:
            assert [int(index.classes[label]) for label in index.labels] == labels


@QUICK
@given(
    st.lists(st.floats(width=32) | st.integers(0, 9).map(float), max_size=3), st.sampled_from([0, 1, 2**31])
)
def test_recordio_of_any_labels(capsys: Any, new: Any, labels: list[float], flag: int) -> None:
    with new() as root:
        (root / "train").mkdir()
        (root / "train" / "0.rec").write_bytes(recordio(labels, flag))
        index = everything_works(capsys, root, root / "packed")
        if flag == 0:
            assert (index is not None) == (
                len(labels) > 0 and all(0 <= label < 2**63 and label.is_integer() for label in labels)
            )


@QUICK
@given(
    st.one_of(
        st.binary(max_size=30), st.text(alphabet="ab\n\r\0é\ufeff\u2028\t ", max_size=12).map(str.encode)
    )
)
@example(b"\xef\xbb\xbf\xef\xbb\xbfa\nb\n")
@example(b"a\r\nb\r\r\n")
@example(b"a\x85\nb\xff\n")
def test_classes_of_any_bytes(capsys: Any, new: Any, text: bytes) -> None:
    with new() as root:
        (root / "train").mkdir()
        (root / "train" / "0.tar").write_bytes(WHOLE["0.tar"])
        (root / CLASSES_FILE).write_bytes(text)
        index = everything_works(capsys, root, root / "packed")
        if index is not None:
            assert index.labels.tolist() == [0, 1]
            assert len(index.classes) == text.rstrip(b"\r\n").count(b"\n") + 1


@settings(QUICK, max_examples=150)
@given(st.sampled_from(IMAGES), DAMAGE, CUT)
def test_damaged_images(data: bytes, damage: Any, cut: float) -> None:
    try:
        pixels = decode_rgb(damaged(data, damage, cut))
    except BadImageError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype.name == "uint8"


def test_what_cannot_be_packed_to_its_end_leaves_nothing(capsys: Any, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(GOOD)
    (tmp_path / "train" / "a" / "2.jpg").symlink_to("nowhere")
    (tmp_path / "val" / "a" / "1.jpg").symlink_to("nowhere")
    before = set(tmp_path.iterdir())
    assert not command(capsys, "pack", str(tmp_path), str(tmp_path / "packed"), "--quiet")
    assert set(tmp_path.iterdir()) == before
    (tmp_path / "val" / "a" / "2.jpg").write_bytes(GOOD)
    assert command(capsys, "pack", str(tmp_path), str(tmp_path / "packed"), "--quiet")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [CLASSES_FILE, "train", "val"]
    assert not command(capsys, "pack", str(tmp_path), str(tmp_path / "packed"), "--quiet")
