"""Read back what wandb wrote: .wandb files are LevelDB logs of wandb's protobuf records.

The file opens with ``:W&B``, a magic number and a version (7 bytes). Then come blocks of 32,768 bytes with
chunks of checksum (4), length (2), kind (1) and data; a record is one FULL chunk or FIRST, MIDDLE …, LAST. A
block's rest of fewer than 7 bytes is padding. A half-written end, as a killed process leaves it, ends the
reading.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["read_history", "read_records"]

_BLOCK, _CHUNK_HEADER, _FILE_HEADER = 32_768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """The ``wandb_internal.Record`` messages of a .wandb file, in order.

    Raises:
        ValueError: it is not a .wandb file, or a checksum is wrong.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is not a .wandb file")
    at, parts = _FILE_HEADER, b""
    while True:
        if _BLOCK - at % _BLOCK < _CHUNK_HEADER:
            at += _BLOCK - at % _BLOCK
        if at + _CHUNK_HEADER > len(data):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + _CHUNK_HEADER : at + _CHUNK_HEADER + length]
        if len(chunk) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"{path} is damaged at byte {at}")
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        at += _CHUNK_HEADER + length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def read_history(path: Path) -> list[dict[str, Any]]:
    """The history rows of a .wandb file: what was given to ``run.log``, and wandb's own ``_step``,
    ``_timestamp``.
    """
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            )
    return rows
