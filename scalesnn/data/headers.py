"""What an image file is, from its bytes: its size without decoding it, and whether it can be decoded at
all."""

from __future__ import annotations

import io
import warnings

import numpy as np

__all__ = ["BadImageError", "as_bitmap", "decode_rgb", "image_kind", "image_size", "is_bitmap", "looks_whole"]


class BadImageError(Exception):
    """These bytes are not a readable image; the message is the reason, without the file's name."""


# What files claim is not always so: a header of a few bytes must not make a decoder ask for gigabytes.
_MOST_PIXELS = 178_956_970  # Pillow refuses more, too

# Markers that open a JPEG frame: C0 to CF but DHT (C4), JPG (C8) and DAC (CC).
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width as stored (EXIF orientation is not applied).

    JPEG and PNG headers are read here, in a few microseconds; Pillow reads the others.

    Raises:
        BadImageError: empty, no image format that Pillow knows, or of an impossible size.
    """
    if not data:
        raise BadImageError("the file is empty")
    height, width = _stored_size(data)
    if height * width > _MOST_PIXELS:
        raise BadImageError(f"its header claims {height} x {width} pixels")
    return height, width


def _stored_size(data: bytes) -> tuple[int, int]:
    if data[:2] == b"\xff\xd8":
        size = _jpeg_size(data)
        if size is not None:
            return size
        raise BadImageError("a JPEG that ends inside its header")
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        height, width = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
        if height and width:
            return height, width
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
    except Exception as error:
        raise BadImageError("not an image") from error
    return height, width


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width from the first frame header, or None where there is none."""
    at, end = 2, len(data)
    while at + 9 <= end:
        if data[at] != 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        if marker in _FRAME_MARKERS:
            height, width = (
                int.from_bytes(data[at + 5 : at + 7], "big"),
                int.from_bytes(data[at + 7 : at + 9], "big"),
            )
            return (height, width) if height and width else None
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a body
            at += 2
        elif marker == 0xDA:  # the scan begins: no frame header came before it
            return None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def looks_whole(data: bytes) -> bool:
    """Whether the end of a JPEG or PNG is there, in a microsecond; true for other formats.

    A truncated JPEG decodes without complaint as long as only its upper part is asked for, so this is looked
    at
    before a window is cut out: whether an image counts as bad must not depend on the window.
    """
    if data[:2] == b"\xff\xd8":
        return data.rfind(b"\xff\xd9") > 0
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data.rfind(b"IEND", -64) > 0
    return True


def image_kind(data: bytes) -> tuple[str, str]:
    """Pillow's names of format and pixel mode, as ("JPEG", "CMYK").

    Raises:
        BadImageError: not an image.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return image.format or "", image.mode
    except Exception as error:
        raise BadImageError("not an image") from error


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode every pixel with Pillow: uint8 [H, W, 3], EXIF orientation not applied.

    Raises:
        BadImageError: the bytes are empty, no image, of an impossible size, or end too early.
    """
    image_size(data)
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith("I"):  # 16 bits: Pillow would cut the values off at 255
                    grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
                    return np.stack((grey, grey, grey), axis=-1)
                return np.asarray(image.convert("RGB"))
    except Exception as error:
        reason = str(error)
        if "cannot identify" in reason:
            reason = "not an image"
        raise BadImageError(reason or type(error).__name__) from error


def as_bitmap(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a binary PPM file: how an image that only Pillow can read reaches another
    decoder."""
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


def is_bitmap(data: bytes) -> bool:
    """Whether ``as_bitmap`` may have made these bytes: a binary PPM file."""
    return data[:2] == b"P6"
