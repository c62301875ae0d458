"""C++ source as a library in this process: compiled with the system's compiler on first use, kept in a cache.

A library is found by the hash of everything that made it (source, flags, torch, compiler, processor). Each
process builds in a folder of its own and moves the result into place, so that a build that died leaves
nothing in the way; a file lock, which the system lets go when its holder dies, keeps several processes from
doing the same work. A library that is not what was built (cut by a full disk) is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

__all__ = ["BUILD_ERRORS", "HAS_COMPILER", "cache_folder", "lock", "reason", "shared_library"]

BUILD_ERRORS = (OSError, RuntimeError, subprocess.SubprocessError)  # what shared_library raises
LOCK_SECONDS = 120.0


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


HAS_COMPILER = _compiler() is not None


def cache_folder() -> Path:
    """Where the compiled libraries are kept: ``SCALESNN_CACHE``, else the user's cache, else a temporary
    folder."""
    candidates = [Path(tempfile.gettempdir()) / f"scalesnn-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # a user without a home folder, in a container
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        candidates.insert(0, home / "scalesnn")
    if os.environ.get("SCALESNN_CACHE"):
        candidates.insert(0, Path(os.environ["SCALESNN_CACHE"]))
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="scalesnn-"))


def shared_library(name: str, code: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library that the compiler makes of ``code``, which may use torch's headers.

    Args:
        name: what its file in the cache begins with.
        flags: of the compiler.

    Raises:
        RuntimeError: there is no compiler, or it failed (``BUILD_ERRORS`` names all that a broken machine
            can raise).
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler on PATH")
    made_by = [code, *flags, torch.__version__, _compiler_version(compiler), _processor()]
    key = hashlib.sha256("\n".join(made_by).encode()).hexdigest()
    path = cache_folder() / f"{name}_{key[:24]}.so"
    if not _is_whole(path):
        with lock(path.with_suffix(".lock")):
            if not _is_whole(path):
                _build(code, path, flags)
    return ctypes.CDLL(str(path))


def _is_whole(path: Path) -> bool:
    """Whether a library in the cache is what was built: loading one that a full disk has cut is a SIGBUS."""
    try:
        return path.with_suffix(".sha256").read_text(encoding="ascii") == _digest(path)
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reason(error: BaseException) -> str:
    """Why a library could not be built, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _build(code: str, path: Path, flags: tuple[str, ...]) -> None:
    """Compile ``code`` to the shared library ``path``, which appears whole or not at all."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder, _ninja_on_path():
        file = Path(folder) / "library.cpp"
        file.write_text(code, encoding="utf-8")
        try:
            cpp_extension.load(
                path.stem,
                [str(file)],
                extra_cflags=[*flags, "-Wno-unknown-pragmas"],
                extra_ldflags=list(flags),
                build_directory=folder,
                is_python_module=False,
                verbose=False,
            )
        except RuntimeError as error:
            said = str(error).splitlines()
            cause = next((line.strip() for line in said if "error: " in line), said[0])
            raise RuntimeError(f"the C++ compiler failed: {cause}") from error
        made, digest = Path(folder) / f"{path.stem}.so", Path(folder) / "digest"
        digest.write_text(_digest(made), encoding="ascii")
        os.replace(digest, path.with_suffix(".sha256"))
        os.replace(made, path)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja lies beside the interpreter in an environment that is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a file lock where the file system has them; after LOCK_SECONDS, or without locks, go on
    without."""
    import fcntl
    import time

    with open(path, "w", encoding="utf-8") as file:
        start = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - start > LOCK_SECONDS:
                    break
                time.sleep(0.05)
            except OSError:
                break
        yield


@cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@cache
def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()
