"""``scalesnn data imagenet`` unpacks ImageNet's official archives into train/WNID/*.JPEG and val/WNID/*.JPEG.

torchvision's parser reads the devkit, which says what the validation images show. Images are read from the
middle of the archives, also of the class archives in ILSVRC2012_img_train.tar, so no second copy is made. A
split is unpacked into .train.partial or .val.partial and gets its name when it is complete. A run that was
cut goes on when it is repeated: files that are there with their full length are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pickle
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from scalesnn.base import UserError
from scalesnn.data.arguments import default_workers
from scalesnn.data.walking import is_hidden

__all__ = ["add_imagenet_command", "unpack_imagenet"]


class _Image(NamedTuple):
    """One image of an archive; ``offset`` counts from the archive's first byte."""

    name: str
    offset: int
    size: int


class _Class(NamedTuple):
    """The images of a class, and how many bytes they are about; listing them may take a while."""

    wnid: str
    images: Callable[[BinaryIO], Iterable[_Image]]
    size: int


def _members(file: BinaryIO, start: int = 0, stop: float = math.inf) -> Iterator[_Image]:
    """The files of the tar archive between the bytes ``start`` and ``stop`` of ``file``.

    Raises:
        tarfile.TarError: it is cut off, or no archive.
    """
    file.seek(start)
    end = start
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            end = member.offset_data + (member.size + 511) // 512 * 512
            if end > stop:
                break
            name = PurePosixPath(member.name).name
            if member.isfile() and not is_hidden(name):
                yield _Image(name, member.offset_data, member.size)
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    file.seek(end)
    if end + 512 > stop or file.read(512) != bytes(512):  # tarfile takes a cut for the end
        raise tarfile.ReadError("it is cut off")


def _train_classes(archive: Path) -> list[_Class]:
    """The class archives n01440764.tar, … inside the archive of training images."""
    with archive.open("rb") as file:
        inner = [member for member in _members(file) if member.name.endswith(".tar")]
    if not inner:
        raise UserError(f"{archive} holds no archives of classes, such as n01440764.tar")

    def images_of(member: _Image) -> Callable[[BinaryIO], Iterable[_Image]]:
        return lambda file: _members(file, member.offset, member.offset + member.size)

    return [_Class(member.name.removesuffix(".tar"), images_of(member), member.size) for member in inner]


def _val_classes(archive: Path, wnids: list[str]) -> list[_Class]:
    """The validation images by class: in the order of their names, the devkit's list says what they show."""
    with archive.open("rb") as file:
        images = sorted(_members(file))
    if len(images) != len(wnids):
        raise UserError(f"{archive} holds {len(images)} images, but the devkit says what {len(wnids)} show")
    found: dict[str, list[_Image]] = {}
    for image, wnid in zip(images, wnids, strict=True):
        found.setdefault(wnid, []).append(image)

    def images_of(chosen: list[_Image]) -> Callable[[BinaryIO], Iterable[_Image]]:
        return lambda _: chosen

    return [_Class(wnid, images_of(some), sum(i.size for i in some)) for wnid, some in sorted(found.items())]


def _val_wnids(source: Path, target: Path, devkit: str) -> list[str]:
    """The WordNet ids of the validation images, from torchvision's meta.bin in ``target``, made from the
    devkit where it is missing.

    Raises:
        UserError: no devkit, a damaged one, or no scipy, which torchvision reads it with.
    """
    from torchvision.datasets import imagenet
    from torchvision.datasets.utils import calculate_md5

    made = target / imagenet.META_FILE
    with contextlib.suppress(RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError):
        return list(imagenet.load_meta_file(str(target))[1])
    archive = source / devkit
    if not archive.is_file():
        raise UserError(f"{source} has no {devkit}, which says what the validation images show")
    checksum = calculate_md5(str(archive))
    official = imagenet.ARCHIVE_META["devkit"]
    if checksum != official[1]:
        print(f"{archive} has another checksum than the official archive; it is taken as it is")
    with tempfile.TemporaryDirectory(prefix=".devkit-", dir=target) as folder:
        (Path(folder) / devkit).symlink_to(archive.resolve())
        imagenet.ARCHIVE_META["devkit"] = (devkit, checksum)
        try:
            imagenet.parse_devkit_archive(folder)
            os.replace(Path(folder) / imagenet.META_FILE, made)
        except ImportError as error:
            raise UserError(
                f"torchvision reads the devkit with scipy ({error}): pip install scipy, "
                "or 'scalesnn[imagenet]'"
            ) from error
        except Exception as error:  # of gzip, tarfile, scipy, or of what they found
            raise UserError(f"{archive} is damaged or is not the devkit: {error}") from error
        finally:
            imagenet.ARCHIVE_META["devkit"] = official
    return list(imagenet.load_meta_file(str(target))[1])


class _Unpacker:
    """Writes classes with several threads; ``stop`` ends all of them after the image that they write."""

    def __init__(self, archive: Path, folder: Path, advance: Callable[[int], None]) -> None:
        self.archive, self.folder, self.advance = archive, folder, advance
        self.stop = threading.Event()

    def unpack(self, part: _Class) -> tuple[int, int]:
        """Write the images of a class that are not there yet; returns how many there are, and were."""
        folder = self.folder / part.wnid
        folder.mkdir(parents=True, exist_ok=True)
        there = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        total = kept = 0
        with self.archive.open("rb") as file:
            for image in part.images(file):
                if self.stop.is_set():
                    break
                total += 1
                if there.get(image.name) == image.size:
                    kept += 1
                else:
                    data = os.pread(file.fileno(), image.size, image.offset)
                    if len(data) < image.size:
                        raise tarfile.ReadError(f"it ends inside {image.name}")
                    (folder / image.name).write_bytes(data)
                self.advance(image.size)
        return total, kept

    def run(self, classes: list[_Class], workers: int) -> tuple[int, int]:
        """``unpack`` all; returns how many images there are, and how many were there."""
        pool = ThreadPoolExecutor(workers)
        try:
            counts = list(pool.map(self.unpack, classes))
        except tarfile.TarError as error:
            raise UserError(f"{self.archive} is damaged: {error}; download it again") from error
        except OSError as error:
            where = error.filename or self.folder
            raise UserError(
                f"{where}: {error.strerror or error}; the same command goes on when that is mended"
            ) from error
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        return sum(total for total, _ in counts), sum(kept for _, kept in counts)


def unpack_imagenet(source: Path, target: Path, workers: int, quiet: bool = True) -> list[str]:
    """Unpack the archives that lie in ``source`` into ``target``.

    Args:
        source: folder with ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar and
            ILSVRC2012_devkit_t12.tar.gz, or all of them.
        target: train/ and val/ are made there, and torchvision's meta.bin.
        workers: threads.
        quiet: show no progress.

    Returns:
        what was unpacked, a line a split.

    Raises:
        UserError: no archives, damaged ones, or files that cannot be written.
    """
    from torchvision.datasets.imagenet import ARCHIVE_META

    names = {kind: name for kind, (name, _) in ARCHIVE_META.items()}
    splits = [split for split in ("train", "val") if (source / names[split]).is_file()]
    if not splits:
        raise UserError(f"{source} holds neither {names['train']} nor {names['val']}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        wnids = _val_wnids(source, target, names["devkit"]) if "val" in splits else []
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from error
    lines = []
    for split in splits:
        archive, finished = source / names[split], target / split
        try:
            classes = _train_classes(archive) if split == "train" else _val_classes(archive, wnids)
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{archive} is damaged: {error}; download it again") from error
        folder = finished if finished.is_dir() else target / f".{split}.partial"
        with _progress(split, sum(part.size for part in classes), quiet) as advance:
            total, kept = _Unpacker(archive, folder, advance).run(classes, workers)
        if folder != finished:
            folder.rename(finished)
        there = f"; {kept} were there" if kept else ""
        lines.append(f"{finished}: {total} images of {len(classes)} classes{there}")
    missing = [names[split] for split in ("train", "val") if split not in splits]
    return lines + [f"{name} is not in {source}" for name in missing]


@contextlib.contextmanager
def _progress(name: str, size: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, speed and the time left; gives the function that moves it on."""
    from rich import progress

    columns: list[Any] = [progress.TextColumn("{task.description}"), progress.BarColumn()]
    columns += [progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn()]
    with progress.Progress(*columns, progress.TimeRemainingColumn(), disable=quiet) as bar:
        task = bar.add_task(name, total=size)
        yield lambda done: bar.advance(task, done)
        bar.update(task, completed=size)


def run_imagenet(args: argparse.Namespace) -> int:
    """The command ``imagenet``."""
    source = Path(args.folder)
    if not source.is_dir():
        raise UserError(f"no folder {source}")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    target = Path(args.output) if args.output else source
    for line in unpack_imagenet(source, target, args.workers or default_workers(), args.quiet):
        print(line)
    return 0


def add_imagenet_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``imagenet`` to the data commands."""
    parser = commands.add_parser(
        "imagenet",
        help="unpack ImageNet's archives",
        description="Unpack ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz in DIR into train/WNID and val/WNID. A run that was cut goes on when "
        "it is repeated.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder with the archives")
    parser.add_argument("--output", metavar="OUT", help="where train and val are made; default: DIR")
    parser.add_argument("-j", "--workers", type=int, default=None, metavar="N", help="threads")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run_imagenet)
