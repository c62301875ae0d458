"""Parquet files as Hugging Face writes them: the same images in the same order as a folder's."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalesnn.base import UserError
from scalesnn.cli import main
from scalesnn.data.dali_loader import dali_problem
from scalesnn.data.layout import find_layout
from scalesnn.data.listing import open_index

PLAIN = ("--mixup-alpha", "0", "--cutmix-alpha", "0")
CLASSES = ["class_0", "class_1", "class_2"]


def write(
    target: Path, images: list[Any], labels: list[Any], names: list[str] | None = CLASSES, **options: Any
) -> None:
    """One file as the datasets library writes it: a struct of bytes and path, a label with names."""
    structs = pa.array(
        [{"bytes": image, "path": f"{n}.JPEG"} for n, image in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": structs, "label": pa.array(labels, pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target, **{"row_group_size": 7, **options})


def contents(split: Path) -> tuple[list[bytes], list[int]]:
    index = open_index(split)
    return [index.read(image) for image in range(len(index))], index.labels.tolist()


@pytest.fixture
def parquet(folder: Path, tmp_path: Path) -> Path:
    """The images of ``folder`` as a Hugging Face download: three training files, two of validation."""
    for split, name, files in (("train", "train", 3), ("val", "validation", 2)):
        images, labels = contents(folder / split)
        for part in range(files):
            where = slice(len(images) * part // files, len(images) * (part + 1) // files)
            target = tmp_path / "hub" / "data" / f"{name}-{part:05d}-of-{files:05d}.parquet"
            write(target, images[where], labels[where])
    (tmp_path / "hub" / "README.md").write_text("A data set.")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "loader", [("--loader", "dali"), ("--loader", "torchvision", "-j", "2")], ids=lambda w: w[1]
)
def test_epochs_are_those_of_the_folder(
    loader: tuple[str, ...], parquet: Path, folder: Path, open_loaders: Any
) -> None:
    if loader[1] == "dali":
        pytest.importorskip("nvidia.dali")
    flags = ("--auto-augment", "none", *PLAIN, *loader)
    packed, plain = open_loaders(parquet, *flags), open_loaders(folder, *flags)
    assert packed.classes == plain.classes == CLASSES
    assert f"validation is on {parquet / 'data' / 'validation'}" in packed.notices
    for split in ("train", "val"):
        one, other = getattr(packed, split).epoch(1), getattr(plain, split).epoch(1)
        for (images, labels), (expected, expected_labels) in zip(one, other, strict=True):
            assert bool((images == expected).all())
            assert bool((labels == expected_labels).all())


def test_two_ranks_that_resume_see_what_one_would_have_seen(parquet: Path, open_loaders: Any) -> None:
    flags = ("--loader", "torchvision", "--random-erase", "1")
    whole = {}
    alone = open_loaders(parquet, *flags, batch_size=8)
    for number, (images, targets) in enumerate(alone.train.epoch(1)):
        keys = alone.train.keys(1, number)
        whole.update(zip(keys.positions.tolist(), zip(images, targets, strict=True), strict=True))
    for rank in (0, 1):
        part = open_loaders(parquet, *flags, batch_size=4, rank=rank, world_size=2)
        for number, (images, targets) in enumerate(part.train.epoch(1, start=2), start=2):
            positions = part.train.keys(1, number).positions.tolist()
            for position, image, target in zip(positions, images, targets, strict=True):
                assert bool((image == whole[position][0]).all())
                assert bool((target == whole[position][1]).all())


def test_the_ways_of_writing_and_of_naming(parquet: Path, folder: Path, tmp_path: Path) -> None:
    images, labels = contents(folder / "train")
    variants: dict[str, dict[str, Any]] = {
        "snappy": {},
        "uncompressed": {"compression": "none", "row_group_size": 100},
        "zstd": {"compression": "zstd", "use_dictionary": False, "data_page_size": 1000},
        "pages-v2": {"data_page_version": "2.0", "version": "2.6", "write_page_index": True},
    }
    for name, options in variants.items():
        write(tmp_path / name / "train.parquet", images, labels, **options)
        index = open_index(tmp_path / name / "train")
        assert [index.read(image) for image in range(61)] == images
        order = np.random.default_rng(1).permutation(61)
        assert [index.read(image) for image in order] == [images[image] for image in order]
        assert index.labels.tolist() == labels
    plain = pa.table({"id": list(range(61)), "picture": pa.array(images, pa.large_binary()), "label": labels})
    (tmp_path / "plain" / "train").mkdir(parents=True)
    pq.write_table(plain, tmp_path / "plain" / "train" / "0000.parquet")  # of pandas, or of a folder a split
    index = open_index(tmp_path / "plain" / "train")
    assert index.classes == ["0", "1", "2"]
    order = np.random.default_rng(0).permutation(61)
    assert [index.read(image) for image in order] == [images[image] for image in order]


WAYS_TO_WRITE = st.builds(
    dict,
    compression=st.sampled_from(["none", "snappy", "zstd", "gzip", "brotli", "lz4"]),
    use_dictionary=st.booleans(),
    data_page_size=st.integers(50, 3000),
    data_page_version=st.sampled_from(["1.0", "2.0"]),
    row_group_size=st.integers(1, 40),
    dictionary_pagesize_limit=st.integers(100, 2000),
    write_batch_size=st.integers(1, 9),
    write_statistics=st.booleans(),
    write_page_index=st.booleans(),
    write_page_checksum=st.booleans(),
)


@given(
    options=WAYS_TO_WRITE,
    images=st.lists(st.binary(min_size=1, max_size=400) | st.none(), min_size=1, max_size=60),
    nested=st.booleans(),
    nullable=st.booleans(),
    draw=st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_way_of_writing_is_read_at_random_places(
    options: dict[str, Any], images: list[Any], nested: bool, nullable: bool, draw: Any, tmp_path: Path
) -> None:
    if not nullable:
        images = [image or b"there" for image in images]
    inner = pa.field("bytes", pa.binary(), nullable=nullable)
    if nested:
        struct = pa.struct([inner, ("path", pa.string())])
        column = pa.array([{"bytes": image, "path": "x"} for image in images], struct)
        field = pa.field("image", struct, nullable=nullable)
    else:
        column, field = pa.array(images, pa.binary()), pa.field("image", pa.binary(), nullable=nullable)
    labels = pa.array([0] * len(images))
    table = pa.table([column, labels], schema=pa.schema([field, ("label", pa.int64())]))
    pq.write_table(table, tmp_path / "train.parquet", **options)
    index = open_index(tmp_path / "train")
    order = list(range(len(images)))
    draw.shuffle(order)
    for image in [*order, *sorted(order)]:
        if images[image] is None:
            with pytest.raises(OSError, match="the row has no bytes"):
                index.read(image)
        else:
            assert index.read(image) == images[image]
    index.close()


@pytest.mark.parametrize("names", [("train", "test"), ("train", "val"), ("train", "valid")])
def test_layouts(names: tuple[str, str], folder: Path, tmp_path: Path, open_loaders: Any) -> None:
    for name, split in zip(names, ("train", "val"), strict=True):
        write(tmp_path / "plain_text" / f"{name}-00000-of-00001-a09b74b3.parquet", *contents(folder / split))
    layout = find_layout(tmp_path)
    assert list(layout.there) == ["train", "val"]
    data = open_loaders(tmp_path, *PLAIN)
    assert (len(data.train.index), len(data.val.index)) == (61, 25)
    shutil.copytree(tmp_path / "plain_text", tmp_path / "other")
    with pytest.raises(UserError, match="holds other, plain_text: name one of them"):
        open_loaders(tmp_path)
    assert len(open_loaders(tmp_path / "other").train.index) == 61


def test_lists_are_stored_and_kept_and_made_anew(
    parquet: Path, tmp_path: Path, open_loaders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_loaders(parquet, *PLAIN, "--cache-dataset", output_dir=str(tmp_path))
    assert len(list((tmp_path / "data-index").glob("*.npz"))) == 2
    assert main(["data", "index", str(parquet)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("scalesnn.data.listing.make_index", None)
        for flags in ((), ("--cache-dataset",)):
            again = open_loaders(parquet, *PLAIN, *flags, output_dir=str(tmp_path))
            assert again.fingerprint == first.fingerprint
            assert again.classes == CLASSES
            assert [again.train.index.read(i) for i in (60, 3)] == [
                first.train.index.read(i) for i in (60, 3)
            ]
    file, before = parquet / "data" / "train-00001-of-00003.parquet", first.train.index.read(30)
    table = pq.read_table(file)
    labels = [(label + 1) % 3 for label in table["label"].to_pylist()]
    pq.write_table(table.set_column(1, "label", pa.array(labels)), file, row_group_size=5)
    for flags in ((), ("--cache-dataset",)):
        changed = open_loaders(parquet, *PLAIN, *flags, output_dir=str(tmp_path))
        assert changed.fingerprint != first.fingerprint
        assert changed.train.index.read(30) == before


def test_bad_rows_are_named_and_replaced(
    folder: Path, tmp_path: Path, open_loaders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = contents(folder / "train")
    damaged = [*images[:3], None, b"", images[5][:200], *images[6:]]
    write(tmp_path / "train-0.parquet", damaged, labels)
    write(tmp_path / "validation-0.parquet", *contents(folder / "val"))
    for loader in ("dali", "torchvision"):
        if loader == "dali" and dali_problem() is not None:
            continue
        data = open_loaders(tmp_path, *PLAIN, "--loader", loader)
        for epoch in (0, 1):
            assert sum(len(batch) for batch, _ in data.train.epoch(epoch)) == 60
        named = {data.train.index.path(image): why for image, why in data.train.bad.reasons.items()}
        assert sorted(named) == [f"{tmp_path}/train-0.parquet#{row}" for row in (3, 4, 5)]
        assert "the row has no bytes" in named[f"{tmp_path}/train-0.parquet#3"]
    assert main(["data", "check", str(tmp_path), "--quiet"]) == 1
    assert "86 images, 3 bad" in capsys.readouterr().out
    listed = open_loaders(tmp_path, *PLAIN)  # leaves out what the list names
    assert len(listed.train.index) == 58
    assert listed.train.index.read(3) == images[6]


def test_a_file_that_is_damaged_during_the_run_costs_only_its_row_group(
    parquet: Path, open_loaders: Any
) -> None:
    data = open_loaders(parquet, *PLAIN, "--loader", "torchvision", "-j", "0")
    file = parquet / "data" / "train-00002-of-00003.parquet"
    content = bytearray(file.read_bytes())
    content[4:40] = bytes(36)  # the header of the first page
    file.write_bytes(content)
    assert sum(len(images) for epoch in (0, 1) for images, _ in data.train.epoch(epoch)) == 120
    assert set(data.train.bad.reasons) == set(range(40, 47))
    assert all("damaged parquet" in reason for reason in data.train.bad.reasons.values())


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "magic"])
def test_a_damaged_file_is_refused_by_name(damage: str, parquet: Path, open_loaders: Any) -> None:
    file = parquet / "data" / "train-00001-of-00003.parquet"
    content = file.read_bytes()
    bad = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "text": b"version https://git-lfs",
        "magic": b"PAR1",
    }
    file.write_bytes(bad[damage])
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is damaged"):
        open_loaders(parquet)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"], "label": [-1]}, r"train\.parquet#0: a label must be a whole number"),
        ({"image": [b"x"], "label": pa.array([None], pa.int64())}, r"train\.parquet#0: no label"),
        ({"image": [b"x"], "label": [3]}, "labels run from 3 to 3, but 3 classes are named"),
        ({"image": [b"x"]}, r"train\.parquet: expected one column of whole numbers"),
        ({"image": [b"x"], "fine": [1], "coarse": [0]}, "found the columns fine, coarse"),
        ({"text": ["x"], "label": [1]}, "expected one column of bytes, or one called 'image'; found none"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no image in the parquet"),
    ],
)
def test_other_tables_are_refused_in_one_line(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = pa.table(columns)
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}}
    if "label" in columns:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=message) as caught:
        open_index(tmp_path / "train")
    assert "\n" not in str(caught.value)


def test_other_class_names_in_validation_are_refused(parquet: Path, folder: Path, open_loaders: Any) -> None:
    write(
        parquet / "data" / "validation-00000-of-00002.parquet",
        *contents(folder / "val"),
        names=["a", "b", "c"],
    )
    with pytest.raises(UserError, match="names other classes"):
        open_loaders(parquet)


def test_large_row_groups_are_said(parquet: Path, open_loaders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalesnn.data.parquet._LARGE_GROUP", 1000)
    assert "`scalesnn data pack` writes shards" in " ".join(open_loaders(parquet).notices)


def test_pack_makes_shards_of_parquet_files(
    parquet: Path, folder: Path, tmp_path: Path, open_loaders: Any
) -> None:
    assert main(["data", "pack", str(parquet), str(tmp_path / "packed"), "--quiet"]) == 0
    packed, plain = open_loaders(tmp_path / "packed", *PLAIN), open_loaders(folder, *PLAIN)
    assert packed.classes == plain.classes
    for (images, labels), (expected, targets) in zip(packed.val.epoch(0), plain.val.epoch(0), strict=True):
        assert bool((images == expected).all())
        assert bool((labels == targets).all())


def test_without_pyarrow_one_line_says_what_to_install(
    parquet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["data", "check", str(parquet)]) == 2
    said = capsys.readouterr().err
    assert "reading parquet files needs pyarrow" in said
    assert "pip install pyarrow" in said
    assert len(said.splitlines()) == 1
