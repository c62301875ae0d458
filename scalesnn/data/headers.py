"""What an image file is, from its bytes: its size without decoding it, whether it can be decoded at all, and
its pixels in 8 bits.

``decode_rgb`` says what every image looks like, for all loaders; ``decodes_alike`` says for which files
another decoder may be asked instead.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = [
    "BadImageError",
    "as_bitmap",
    "decode_rgb",
    "decodes_alike",
    "image_kind",
    "image_size",
    "is_bitmap",
    "looks_whole",
]


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
    for marker, at in _jpeg_segments(data):
        if marker in _FRAME_MARKERS and at + 9 <= len(data):
            height, width = (
                int.from_bytes(data[at + 5 : at + 7], "big"),
                int.from_bytes(data[at + 7 : at + 9], "big"),
            )
            return (height, width) if height and width else None
    return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment of a JPEG up to the first scan, which is the last one."""
    at, end = 2, len(data)
    while at + 4 <= end:
        if data[at] != 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a body
            at += 2
        else:
            yield marker, at
            if marker == 0xDA:  # the scan begins
                return
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def looks_whole(data: bytes) -> bool:
    """Whether the end of a JPEG or PNG is there, in a few microseconds; true for other formats.

    A truncated JPEG decodes without complaint as long as only its upper part is asked for, so this is looked
    at before a window is cut out: whether an image counts as bad must not depend on the window. The end of a
    JPEG comes after its scan; a thumbnail in its header has an end of its own.
    """
    if data[:2] == b"\xff\xd8":
        scan = next((at for marker, at in _jpeg_segments(data) if marker == 0xDA), len(data))
        return data.rfind(b"\xff\xd9", scan) > 0
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data.rfind(b"IEND", -64) > 0
    return True


def decodes_alike(data: bytes) -> bool:
    """Whether another decoder gives the pixels of ``decode_rgb``: JPEG, WebP, PNG of up to 8 bits a channel,
    BMP of 24 bits. In other formats, and in wider values, decoders differ in scale and orientation."""
    if data[:2] == b"\xff\xd8" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return True
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[24:25] != b"\x10"
    return data[:2] == b"BM" and data[28:34] == b"\x18\0\0\0\0\0"


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
    """Decode every pixel with Pillow: uint8 [H, W, 3].

    Black is 0 and white is 255: values of another number of bits are scaled by what the format calls white
    (2^n - 1 for n bits; a PGM's or PPM's own maximum). Alpha is dropped. A TIFF is turned as its orientation
    says; the EXIF orientation of other formats is not applied.

    Raises:
        BadImageError: the bytes are empty, no image, of an impossible size, or end too early; or the values
            have no defined white (floating-point, signed or 32-bit ones).
    """
    image_size(data)
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                levels = _levels(image)
                if levels is None:
                    return np.asarray(image.convert("RGB"))
                black, white = levels
                share = (np.asarray(image).astype(np.float64) - black) / (white - black)
                grey = (255 * share).round().clip(0, 255).astype(np.uint8)
                return np.stack((grey, grey, grey), axis=-1)
    except BadImageError:
        raise
    except Exception as error:
        reason = str(error)
        if "cannot identify" in reason:
            reason = "not an image"
        raise BadImageError(reason or type(error).__name__) from error


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags


def _levels(image: Any) -> tuple[int, int] | None:
    """Black and white of a grey image of more than 8 bits; None for images that Pillow gives in 8 bits."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if np.any(np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)) != 1):
        raise BadImageError("signed or floating-point values have no defined white")
    if image.format == "PPM" and image.mode == "I":
        return 0, 65535  # Pillow has scaled it
    if image.format in ("PNG", "TIFF", "JPEG2000") and image.mode.startswith("I;16"):
        white = (1 << int(np.max(tags.get(_BITS, 16)))) - 1
        return (white, 0) if tags.get(_PHOTOMETRIC, 1) == 0 else (0, white)
    if image.mode.startswith(("I", "F")):
        raise BadImageError(f"{image.format} values of mode {image.mode} have no defined white")
    return None


def as_bitmap(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a binary PPM file: how an image that only Pillow can read reaches another
    decoder."""
    height, width, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


def is_bitmap(data: bytes) -> bool:
    """Whether ``as_bitmap`` may have made these bytes: a binary PPM file."""
    return data[:2] == b"P6"
