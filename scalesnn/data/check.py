"""``scalesnn data check DIR``: decode every image once, and list those that cannot be used."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scalesnn.base import UserError, printable
from scalesnn.data.arguments import default_workers
from scalesnn.data.frames import decode_frames
from scalesnn.data.headers import BadImageError, decode_rgb, image_kind, image_size
from scalesnn.data.index import ImageIndex
from scalesnn.data.layout import find_layout
from scalesnn.data.listing import BAD_LIST, bad_list_name, is_frames, open_index

__all__ = ["Finding", "add_check_command", "check_index", "write_list"]

_FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}


@dataclass(frozen=True)
class Finding:
    """Something about one image.

    Attributes:
        path: the image, as ImageIndex.path gives it.
        bad: it cannot be used; otherwise it works, but is not what its name says or not RGB.
        reason: why.
    """

    path: str
    bad: bool
    reason: str


def inspect(index: ImageIndex, image: int) -> list[Finding]:
    """Decode one image and say what is odd about it."""
    path = index.path(image)
    try:
        data = index.read(image)
        if is_frames(index):
            decode_frames(data)
            return []
        image_size(data)
        decode_rgb(data)
        kind, mode = image_kind(data)
    except FileNotFoundError:
        return [Finding(path, True, "the file is gone, or a link that leads nowhere")]
    except OSError as error:
        return [Finding(path, True, f"cannot be read: {error.strerror or error}")]
    except BadImageError as error:
        return [Finding(path, True, str(error))]
    found = []
    extension = os.path.splitext(index.names[image])[1].lower()
    if extension and extension not in _FORMATS.get(kind, ()):
        found.append(Finding(path, False, f"{kind} in a file named {extension}"))
    if mode == "CMYK":
        found.append(Finding(path, False, "CMYK"))
    return found


def check_index(index: ImageIndex, workers: int) -> Iterator[list[Finding]]:
    """The findings of each image, in order; ``workers`` threads decode."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda image: inspect(index, image), range(len(index)))


def write_list(findings: Iterable[Finding], root: Path, target: Path) -> None:
    """Write the bad images to ``target``, one a line with a tab before the reason; the others as comments."""
    lines = ["# images that cannot be used, from `scalesnn data check`; training leaves them out"]
    for finding in findings:
        name = bad_list_name(os.path.relpath(finding.path, root))
        lines.append(f"{'' if finding.bad else '# works: '}{name}\t{printable(finding.reason)}")
    target.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))


def run_check(args: argparse.Namespace) -> int:
    """The command. Returns 0 where every image can be used, 1 where not.

    Raises:
        UserError: no such folder, or the list cannot be written.
    """
    from rich.progress import track

    root = Path(args.folder)
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    splits = list(find_layout(root).there.values()) or [root]
    target = Path(args.output) if args.output else root / BAD_LIST
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target.parent} cannot be written to: name a file with --output")
    findings: list[Finding] = []
    total = 0
    for split in splits:
        index = open_index(split)
        total += len(index)
        print(*index.left_out, sep="\n", end="\n" if index.left_out else "")
        checked = check_index(index, args.workers or default_workers())
        for found in track(checked, f"checking {split}", total=len(index), disable=args.quiet):
            findings += found
        index.close()
    write_list(findings, root, target)
    for finding in findings:
        print(f"{'bad  ' if finding.bad else 'works'}  {printable(f'{finding.path}: {finding.reason}')}")
    bad = sum(finding.bad for finding in findings)
    notes = Counter(finding.reason for finding in findings if not finding.bad)
    odd = "".join(f"; {count} {reason}" for reason, count in notes.most_common())
    print(f"{total} images, {bad} bad{odd}; list in {target}")
    return 1 if bad else 0


def add_check_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``check`` to the data commands."""
    parser = commands.add_parser(
        "check",
        help="find unreadable images",
        description="Decode every image of DIR/train and DIR/val (or below DIR) and list what is wrong.",
    )
    parser.add_argument("folder", metavar="DIR", help="data folder")
    parser.add_argument(
        "--output", metavar="FILE", help=f"the list; default: DIR/{BAD_LIST}, where training looks"
    )
    parser.add_argument("-j", "--workers", type=int, default=None, help="threads")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run_check)
