"""Broken files: found by ``scalesnn data check``, survived in training, left out of evaluation."""

from __future__ import annotations

import argparse
import io
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scalesnn.base import UserError
from scalesnn.data.commands import add_data_command

LOADERS = [("--loader", "dali"), ("--loader", "torchvision", "-j", "0")]
both = pytest.mark.parametrize("loader", LOADERS, ids=["dali", "torchvision"])
PLAIN = ("--mixup-alpha", "0", "--cutmix-alpha", "0", "--random-erase", "0", "--auto-augment", "none")


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind, **options)
    return target.getvalue()


def jpeg_of_another_size(data: bytes, height: int, width: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def broken_files(pixels: np.ndarray) -> dict[str, bytes]:
    """Fifteen kinds of file that are not an image: name → bytes."""
    jpeg, png = encoded(pixels, "JPEG"), encoded(pixels, "PNG")
    return {
        "empty.jpg": b"",
        "text.jpg": b"not an image at all\n" * 20,
        "web_page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "noise.jpg": np.random.default_rng(0).bytes(3000),
        "zeros.jpg": bytes(2000),
        "start_only.jpg": b"\xff\xd8",
        "header_cut.jpg": jpeg[:150],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "last_bytes_missing.jpg": jpeg[:-200],
        "no_height.jpg": jpeg_of_another_size(jpeg, 0, 64),
        "claims_gigapixels.jpg": jpeg_of_another_size(jpeg, 65000, 65000),
        "progressive_cut.jpg": encoded(pixels, "JPEG", progressive=True)[:900],
        "half.png": png[: len(png) // 2],
        "flipped_bits.png": png[:200] + bytes(byte ^ 255 for byte in png[200:260]) + png[260:],
        "half.webp": encoded(pixels, "WEBP")[:300],
        "half.bmp": encoded(pixels, "BMP")[:500],
        "half.tif": encoded(pixels, "TIFF")[:700],
    }


def odd_but_fine(pixels: np.ndarray) -> dict[str, bytes]:
    """Files that must simply work."""
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    palette = io.BytesIO()
    Image.fromarray(pixels).quantize(16).save(palette, "PNG")
    deep = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(deep, "PNG")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(turned, "JPEG", exif=exif)
    return {
        "cmyk.jpg": cmyk.getvalue(),
        "is_a_png.jpg": encoded(pixels, "PNG"),
        "is_a_gif.jpg": encoded(pixels, "GIF"),
        "is_a_webp.jpg": encoded(pixels, "WEBP"),
        "upper_case.JPEG": encoded(pixels, "JPEG"),
        "palette.png": palette.getvalue(),
        "alpha.png": encoded(np.dstack((pixels, pixels[:, :, :1])), "PNG"),
        "sixteen_bits.png": deep.getvalue(),
        "grey.jpg": encoded(pixels[:, :, 0], "JPEG"),
        "turned.jpg": turned.getvalue(),
        "progressive.jpg": encoded(pixels, "JPEG", progressive=True),
        "one_pixel.png": encoded(pixels[:1, :1], "PNG"),
    }


@pytest.fixture
def broken(tmp_path: Path, make_folder: Any, picture: Any) -> Path:
    """60 good images in train and 9 in val, and every kind of broken file in both."""
    root = make_folder(tmp_path, 60, 9)
    for split in ("train", "val"):
        for name, data in broken_files(picture(0, 60, 64)).items():
            (root / split / "class_1" / name).write_bytes(data)
        (root / split / "class_1" / "leads_nowhere.jpg").symlink_to("not_there.jpg")
    return root


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_data_command(parser.add_subparsers())
    args = parser.parse_args(["data", *words])
    return args.run(args)


@both
def test_training_survives_every_kind_of_broken_file(
    loader: tuple[str, ...], broken: Path, open_loaders: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_loaders(broken, *loader, *PLAIN, batch_size=8)
    count = len(broken_files(np.zeros((60, 64, 3), np.uint8))) + 1
    with caplog.at_level(logging.WARNING):
        shown = sum(len(images) for images, _ in data.train.epoch(0))
    assert shown == 8 * len(data.train)
    asked = np.concatenate([data.train.keys(0, number).images for number in range(len(data.train))])
    bad = {
        number
        for number, name in enumerate(data.train.index.names)
        if name in _broken_names(data.train.index)
    }
    assert len(bad) == count
    assert bad & set(asked.tolist()) <= set(data.train.bad.reasons) <= bad
    assert data.train.bad.replaced == sum(image in bad for image in asked)
    assert data.train.stats["replaced_images"] == data.train.bad.replaced
    for image in data.train.bad.reasons:
        assert data.train.index.path(image) in caplog.text


def _broken_names(index: Any) -> set[str]:
    return {name for name in index.names if not name.split("/")[1].split(".")[0].isdigit()}


@both
def test_evaluation_leaves_broken_files_out_and_counts_the_others_once(
    loader: tuple[str, ...], broken: Path, open_loaders: Any
) -> None:
    for world in (1, 2):
        shown = 0
        for rank in range(world):
            data = open_loaders(broken, *loader, batch_size=4, rank=rank, world_size=world)
            shown += sum(len(images) for images, _ in data.val.epoch(0))
        assert shown == 9


@both
def test_odd_files_work_and_look_as_pillow_shows_them(
    loader: tuple[str, ...], tmp_path: Path, make_folder: Any, picture: Any, open_loaders: Any
) -> None:
    root = make_folder(tmp_path, 6, 3)
    files = odd_but_fine(picture(4, 50, 70))
    for name, data in files.items():
        (root / "val" / "class_0" / name).write_bytes(data)
    data = open_loaders(root, *loader, "--val-resize-size", "32")
    shown = torch.cat([images for images, _ in data.val.epoch(0)])
    assert len(shown) == 3 + len(files)
    assert not data.val.bad.reasons
    from torchvision.transforms import functional as F

    for image, name in zip(shown, data.val.index.names, strict=True):
        plain = (
            Image.fromarray(picture(4, 50, 70)[:, :, 0])
            if "sixteen" in name
            else Image.open(root / "val" / name)
        )
        stored = F.resize(plain.convert("RGB"), [32])
        expected = F.normalize(
            F.to_tensor(F.center_crop(stored, [32])), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        )
        limit = 3.0 if "cmyk" in name else 0.5
        assert (image - expected).abs().mean() * 255 * 0.225 < limit, name


def test_bad_images_that_replace_each_other_are_survived(
    tmp_path: Path, make_folder: Any, picture: Any, open_loaders: Any
) -> None:
    root = make_folder(tmp_path, 40, 3)
    files = broken_files(picture(0, 60, 64))
    for number in range(8):  # only found by decoding, and each the next one's replacement
        name = ("flipped_bits.png", "half.bmp", "half.tif")[number % 3]
        (root / "train" / "class_1" / f"x{number}_{name}").write_bytes(files[name])
    (root / "train" / "class_1" / "x9_gif.jpg").write_bytes(encoded(picture(1, 50, 50), "GIF"))
    for seed in range(4):
        data = open_loaders(root, *PLAIN, batch_size=3, seed=seed)
        for epoch in (0, 1):
            assert sum(len(images) for images, _ in data.train.epoch(epoch)) == 48
        assert len(data.train.bad.reasons) == 8
        assert all("/x" in data.train.index.names[image] for image in data.train.bad.reasons)


@both
@pytest.mark.parametrize("damage", ["cut", "gone", "emptied"])
def test_a_file_that_breaks_during_the_run_is_replaced(
    damage: str, loader: tuple[str, ...], tmp_path: Path, make_folder: Any, open_loaders: Any
) -> None:
    root = make_folder(tmp_path, 30, 3)
    data = open_loaders(root, *loader, *PLAIN, batch_size=5)
    before = [images for images, _ in data.train.epoch(1)]
    file = root / "train" / "class_2" / "0005.jpg"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 700 if damage == "cut" else 0])
    after = [images for images, _ in data.train.epoch(1)]
    image = data.train.index.names.index("class_2/0005.jpg")
    assert list(data.train.bad.reasons) == [image]
    assert data.train.bad.replaced == 1
    for number, (first, second) in enumerate(zip(before, after, strict=True)):
        same = (first == second).flatten(1).all(dim=1).numpy()
        assert np.array_equal(same, data.train.keys(1, number).images != image)


@both
@pytest.mark.parametrize("name", ["text.jpg", "half.jpg", "flipped_bits.png", "half.bmp"])
def test_bad_images_stop_the_run_where_that_is_asked_for(
    name: str, loader: tuple[str, ...], tmp_path: Path, make_folder: Any, picture: Any, open_loaders: Any
) -> None:
    root = make_folder(tmp_path, 30, 3)
    (root / "train" / "class_0" / name).write_bytes(broken_files(picture(0, 60, 64))[name])
    data = open_loaders(root, *loader, "--bad-images", "stop", batch_size=4)
    with pytest.raises(UserError, match=f"bad image .*{name}: "):
        [list(data.train.epoch(epoch)) for epoch in (0, 1)]


@both
def test_a_folder_that_goes_away_ends_the_run(
    loader: tuple[str, ...], tmp_path: Path, make_folder: Any, open_loaders: Any
) -> None:
    root = make_folder(tmp_path, 40, 3)
    data = open_loaders(root, *loader)
    for file in (root / "train").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(UserError, match="unreadable"):
        list(data.train.epoch(0))


def test_check_names_every_broken_file_and_training_leaves_them_out(
    broken: Path, picture: Callable[..., np.ndarray], open_loaders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in odd_but_fine(picture(4, 50, 70)).items():
        (broken / "train" / "class_0" / name).write_bytes(data)
    assert command("check", str(broken), "--quiet", "-j", "2") == 1
    said = capsys.readouterr().out
    listed = (broken / "bad-images.txt").read_text()
    bad = {line.split("\t")[0] for line in listed.splitlines() if line[0] != "#"}
    names = [*broken_files(picture(0, 60, 64)), "leads_nowhere.jpg"]
    assert bad == {f"{split}/class_1/{name}" for split in ("train", "val") for name in names}
    for name in names:
        assert name in said
    for note in ("cmyk.jpg: CMYK", "is_a_png.jpg: PNG in a file named .jpg", "is_a_gif.jpg: GIF in"):
        assert note in said
    data = open_loaders(broken)
    assert data.train.number_of_images == 60 + len(odd_but_fine(picture(4, 50, 70)))
    assert "36 images are left out" in " ".join(data.notices)
    list(data.train.epoch(0))
    assert not data.train.bad.reasons
    with pytest.raises(UserError, match="names 36 bad images"):
        open_loaders(broken, "--bad-images", "stop")


def test_a_name_that_is_not_utf8_is_no_obstacle(
    tmp_path: Path, make_folder: Any, open_loaders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path, 12, 3)
    folder = os.fsencode(root / "train" / "class_0")
    (root / "train" / "class_0" / "0000.jpg").rename(os.fsdecode(folder + b"/caf\xe9.jpg"))
    with open(folder + b"/d\xe9chir\xe9.jpg", "wb") as file:
        file.write(b"torn")
    data = open_loaders(root, "--cache-dataset", output_dir=str(tmp_path / "run"))
    data = open_loaders(root, "--cache-dataset", output_dir=str(tmp_path / "run"))
    assert sum(len(images) for images, _ in data.train.epoch(0)) == 12
    assert command("check", str(root), "--quiet") == 1
    assert "\ufffd" in capsys.readouterr().out
    assert open_loaders(root).train.number_of_images == 12


def test_check_is_content_with_a_good_folder(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "list.txt"
    assert command("check", str(folder), "--quiet", "--output", str(target)) == 0
    assert target.read_text().startswith("#")
