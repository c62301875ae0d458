"""Which files a listing takes: every folder once, hidden entries never, and whatever is left out counted and
named."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from scalesnn.base import UserError, printable

__all__ = ["HIDDEN", "LeftOut", "Walk", "is_folder", "is_hidden", "state_of", "walk_classes"]

HIDDEN = "hidden or system entries"
_LINK = "folders that are listed elsewhere already"
_KIND = "files of another kind"
_TICK_NS = 20_000_000  # the coarsest clock of a local file system's time stamps

# What desktops, NAS boxes and archive tools put between files, in lower case; names that begin with a dot are
# hidden anyway.
_SYSTEM = {"@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin"}
_SYSTEM |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "system volume information"}


def is_hidden(name: str) -> bool:
    """Whether an entry of a folder or of a tar is never data: .ipynb_checkpoints, ._1.jpg, @eaDir,
    Thumbs.db."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@dataclass
class LeftOut:
    """What a listing leaves out: how many for each reason, and the first names."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one; ``reason`` is a plural such as "labels without an image"."""
        self.merge(LeftOut({reason: 1}, {reason: [name]}))

    def merge(self, other: LeftOut) -> None:
        """Count what another listing left out."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            first = self.names.setdefault(reason, [])
            first += other.names[reason][: 3 - len(first)]

    def lines(self, root: Path) -> list[str]:
        """One line for the user where anything was left out, none otherwise."""
        if not self.counts:
            return []
        reasons = (
            f"{count} {reason} ({', '.join(self.names[reason])}{', …' if count > 3 else ''})"
            for reason, count in self.counts.items()
        )
        return [printable(f"left out below {root}: {'; '.join(reasons)}")]


def state_of(path: str, settle: bool = False) -> str:
    """What changes with a file (size, time stamp) or with a folder's entries (time stamp); "" for nothing
    there.

    Args:
        path: a file or folder.
        settle: wait out a time stamp of this very moment, so that a change after this call shows.
    """
    try:
        found = os.stat(path)
    except OSError:
        return ""
    if settle and abs(time.time_ns() - found.st_mtime_ns) < _TICK_NS:
        time.sleep(_TICK_NS / 1e9)
        return state_of(path)
    folder = (found.st_mode & 0o170000) == 0o040000
    return f"{found.st_mtime_ns}" if folder else f"{found.st_size} {found.st_mtime_ns}"


@dataclass
class Walk:
    """What lies below class folders.

    Attributes:
        files: class → paths of its files relative to the root, folder by folder, sorted.
        folders: every folder that was listed, relative to the root → its ``state_of``.
        left_out: the rest.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass
class _Tree:
    """A folder and the real folders below it, without following links."""

    files: dict[str, list[str]] = field(default_factory=dict)  # folder → sorted names
    states: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)  # links to folders
    left_out: LeftOut = field(default_factory=LeftOut)


_Identity = tuple[int, int]


def _identity(path: str) -> _Identity:
    found = os.stat(path)
    return found.st_dev, found.st_ino


class _Walker:
    def __init__(self, root: Path, extensions: tuple[str, ...]) -> None:
        self.root, self.extensions = os.path.join(root, ""), extensions
        self.seen: set[_Identity] = set()

    def relative(self, path: str) -> str:
        return path[len(self.root) :]

    def tree(self, top: str) -> _Tree:
        """Walk through a folder that nobody else walks through."""
        found = _Tree()
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            if folder != top:
                identity = _identity(folder)
                if identity in self.seen:  # a class folder is a link to here, or a mount shows it again
                    found.left_out.add(_LINK, self.relative(folder))
                    continue
                self.seen.add(identity)
            found.states[self.relative(folder)] = state_of(folder, settle=True)
            names = found.files[folder] = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        found.left_out.add(HIDDEN, self.relative(entry.path))
                    elif not is_folder(entry):
                        if entry.name.lower().endswith(self.extensions) and _is_plain(entry):
                            names.append(entry.name)
                        else:
                            found.left_out.add(_KIND, self.relative(entry.path))
                    elif entry.is_symlink():
                        found.links.append(entry.path)
                    else:
                        waiting.append(entry.path)
            names.sort()
        return found


def _is_plain(entry: os.DirEntry[str]) -> bool:
    """Whether reading cannot hang: not a pipe, socket or device. A link that leads nowhere is named when it
    is read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _parts(folder: str) -> list[str]:
    return folder.split(os.sep)


def walk_classes(root: Path, names: Iterable[str], extensions: tuple[str, ...]) -> Walk:
    """List the files with one of ``extensions`` (in any case) below each class folder, at any depth.

    Links to folders are followed after all real folders were listed, in sorted order, and only to folders
    that were not listed yet; so every real folder counts once and a link to a folder above itself ends.

    Raises:
        UserError: a folder cannot be listed, or two class folders are one.
    """
    walker, result = _Walker(root, extensions), Walk()
    try:
        owners: dict[_Identity, str] = {}
        above = {_identity(str(folder)) for folder in (root.resolve(), *root.resolve().parents)}
        for name in sorted(names):
            identity = _identity(os.path.join(root, name))
            if identity in above:
                result.left_out.add(_LINK, name)
            elif identity in owners:
                raise UserError(
                    f"{root}: the class folders {owners[identity]} and {name} are the same folder"
                )
            else:
                owners[identity] = name
        walker.seen = above | set(owners)
        with ThreadPoolExecutor(min(16, len(owners) or 1)) as pool:
            tops = {name: os.path.join(root, name) for name in owners.values()}
            trees = dict(zip(tops, pool.map(walker.tree, tops.values()), strict=True))
        for name, tree in trees.items():
            for more in _behind_links(walker, tree):
                tree.files |= more.files
                tree.states |= more.states
                tree.left_out.merge(more.left_out)
            folders = sorted(tree.files, key=_parts)
            result.files[name] = [
                os.path.join(walker.relative(folder), file)
                for folder in folders
                for file in tree.files[folder]
            ]
            result.folders |= tree.states
            result.left_out.merge(tree.left_out)
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be listed: {error.strerror or error}") from error
    return result


def _behind_links(walker: _Walker, tree: _Tree) -> Iterator[_Tree]:
    waiting = sorted(tree.links, reverse=True)
    while waiting:
        link = waiting.pop()
        identity = _identity(link)
        if identity in walker.seen:
            tree.left_out.add(_LINK, walker.relative(link))
            continue
        walker.seen.add(identity)
        more = walker.tree(link)
        waiting += sorted(more.links, reverse=True)
        yield more
