"""Values of any width become the same 8 bits in both loaders, or the file is called bad by both."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scalesnn.data.headers import BadImageError, decode_rgb, decodes_alike, looks_whole

SIZE = 40
ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE]
GREY = (COLUMNS * 255 // (SIZE - 1)).astype(np.uint8)  # black on the left, white on the right
RGB = np.stack((GREY, (ROWS * 255 // (SIZE - 1)).astype(np.uint8), 255 - GREY), axis=-1)


def tiff(data: bytes, bits: int, photometric: int = 1, sample_format: int = 1, orientation: int = 1) -> bytes:
    """An uncompressed grey TIFF of one strip, from the format's description."""
    tags = {
        256: SIZE,
        257: SIZE,
        258: bits,
        259: 1,
        262: photometric,
        273: 8 + 2 + 12 * 11 + 4,
        274: orientation,
    }
    tags |= {277: 1, 278: SIZE, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def pnm(kind: str, maximum: int, values: np.ndarray) -> bytes:
    """A PGM or PPM, as text (P2, P3) or binary, from the format's description."""
    scaled = (values.astype(float) * maximum / 255).round()
    header = f"{kind}\n{SIZE} {SIZE}\n{maximum}\n".encode()
    if kind in ("P2", "P3"):
        return header + " ".join(str(int(value)) for value in scaled.reshape(-1)).encode() + b"\n"
    return header + scaled.astype(">u2" if maximum > 255 else "u1").tobytes()


def packed_12_bits(values: np.ndarray) -> bytes:
    scaled = (values.astype(np.uint32) * 4095 // 255).reshape(-1, 2)
    pairs = scaled[:, 0] << 12 | scaled[:, 1]
    return np.stack((pairs >> 16, pairs >> 8 & 255, pairs & 255), axis=-1).astype(np.uint8).tobytes()


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


WIDE = GREY.astype(np.uint16) * 257
GREYS = {
    "12_bits.pgm": pnm("P5", 4095, GREY),
    "10_bits_text.pgm": pnm("P2", 1023, GREY),
    "4_bits_text.pgm": pnm("P2", 15, GREY),
    "100.pgm": pnm("P5", 100, GREY),
    "16_bits.pgm": pnm("P5", 65535, GREY),
    "16_bits.png": encoded(WIDE, "PNG"),
    "16_bits.tif": tiff(WIDE.tobytes(), 16),
    "16_bits_lzw.tif": encoded(WIDE, "TIFF", compression="tiff_lzw"),
    "white_is_0.tif": tiff((65535 - WIDE).tobytes(), 16, photometric=0),
    "12_bits.tif": tiff(packed_12_bits(GREY), 12),
    "8_bits.tif": tiff(GREY.tobytes(), 8),
    "is_a_jp2.png": encoded(WIDE, "JPEG2000"),
}
COLOURS = {
    "100.ppm": pnm("P6", 100, RGB),
    "12_bits.ppm": pnm("P6", 4095, RGB),
    "5_bits_text.ppm": pnm("P3", 31, RGB),
    "16_bits.ppm": pnm("P6", 65535, RGB),
    "plain.bmp": encoded(RGB, "BMP"),
}
BAD = {
    "float.tif": encoded(GREY.astype(np.float32), "TIFF"),
    "float_to_1.tif": encoded(GREY.astype(np.float32) / 255, "TIFF"),
    "int_32.tif": encoded(GREY.astype(np.int32), "TIFF"),
    "unsigned_32.tif": tiff(GREY.astype(np.uint32).tobytes(), 32),
    "signed_16.tif": tiff(GREY.astype(np.int16).tobytes(), 16, sample_format=2),
    "is_a_pfm.ppm": f"Pf\n{SIZE} {SIZE}\n-1.0\n".encode() + (GREY / 255).astype("<f4").tobytes(),
}


@pytest.mark.parametrize("name", [*GREYS, *COLOURS])
def test_other_widths_are_scaled_to_black_and_white(name: str) -> None:
    found = decode_rgb((GREYS | COLOURS)[name]).astype(int)
    expected = RGB if name in COLOURS else np.stack((GREY, GREY, GREY), axis=-1)
    coarse = 255 / 2 / 15 if "4_bits" in name else 255 / 2 / 31 if "5_bits" in name else 4
    assert np.abs(found - expected).max() <= coarse
    assert found[:, -1, 0].min() >= 253


@pytest.mark.parametrize("name", BAD)
def test_values_without_a_defined_white_are_bad(name: str) -> None:
    with pytest.raises(BadImageError, match="no defined white"):
        decode_rgb(BAD[name])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_it_says(orientation: int) -> None:
    turned = decode_rgb(tiff(GREY.tobytes(), 8, orientation=orientation))[..., 0].astype(int)
    white = {1: turned[:, -1], 2: turned[:, 0], 3: turned[:, 0], 4: turned[:, -1]}
    white |= {5: turned[-1], 6: turned[-1], 7: turned[0], 8: turned[0]}
    assert white[orientation].min() == 255


def test_both_loaders_show_the_same(tmp_path: Path, open_loaders: Any, make_folder: Any) -> None:
    root = make_folder(tmp_path, 60, 3)
    turned = {f"turned{n}.tif": tiff(GREY.tobytes(), 8, orientation=n) for n in (3, 6)}
    for name, data in (GREYS | COLOURS | BAD | turned).items():
        (root / "val" / "class_0" / name).write_bytes(data)
    shown, bad = {}, {}
    for loader in ("dali", "torchvision"):
        data = open_loaders(root, "--loader", loader, "-j", "0", batch_size=1)
        names = data.val.index.names
        images = {}
        for number, (batch, _) in enumerate(data.val.epoch(0)):
            if len(batch):
                images[names[int(data.val.keys(0, number).images[0])]] = batch[0].clone()
        shown[loader], bad[loader] = images, {names[image] for image in data.val.bad.reasons}
    assert bad["dali"] == bad["torchvision"] == {f"class_0/{name}" for name in BAD}
    assert set(shown["dali"]) == set(shown["torchvision"])
    for name, image in shown["dali"].items():
        assert float((image - shown["torchvision"][name]).abs().mean()) * 255 * 0.225 < 0.5, name


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_jpeg() -> None:
    thumbnail = encoded(RGB[::4, ::4], "JPEG")
    block = b"Exif\0\0" + thumbnail
    whole = encoded(RGB, "JPEG", quality=95, exif=block)
    assert b"\xff\xd9" in whole[: len(block) + 24]
    assert looks_whole(whole)
    assert looks_whole(whole + bytes(100))
    for share in (0.5, 0.8, 0.99):
        assert not looks_whole(whole[: int(len(whole) * share)])


def test_what_decoders_agree_on_is_left_to_them() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        assert decodes_alike(encoded(RGB, kind))
    for data in (
        GREYS["16_bits.png"],
        GREYS["8_bits.tif"],
        encoded(RGB, "GIF"),
        encoded(RGB, "PPM"),
        b"",
        b"BM",
    ):
        assert not decodes_alike(data)
