"""The kernel source as a CPU library: compiled with the system's C++ compiler on first use, kept in a cache.

A library is found by the hash of everything that made it (source, surrogate, flags, compiler, processor).
Each process
builds in a folder of its own and moves the result into place, so that a build that died leaves nothing in
the way; a
file lock, which the system lets go when its holder dies, keeps several processes from doing the same work.
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

from scalesnn.kernels.source import SCALARS, fields, scalar_of, source, surrogate_macros

__all__ = ["HAS_COMPILER", "available", "cache_folder", "call", "library", "load"]

logger = logging.getLogger("scalesnn")

# No fused multiply-add: fp32 results equal torch's bit for bit. The other two let the compiler vectorise
# comparisons.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
)
TYPES = {"integer": ctypes.c_longlong, "number": ctypes.c_double, "pointer": ctypes.c_void_p}
FUNCTIONS = ("forward", "statistics", "normalise_backward", "pack", "unpack")
LOCK_SECONDS = 120.0


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


HAS_COMPILER = _compiler() is not None


def cache_folder() -> Path:
    """Where the compiled libraries are kept: ``SCALESNN_CACHE``, else the user's cache, else a temporary
    folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    candidates = [home / "scalesnn", Path(tempfile.gettempdir()) / f"scalesnn-{os.getuid()}"]
    if os.environ.get("SCALESNN_CACHE"):
        candidates.insert(0, Path(os.environ["SCALESNN_CACHE"]))
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="scalesnn-"))


@cache
def available() -> bool:
    """Whether the CPU kernels can be used here; says why not, once."""
    try:
        library(None)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("no fused CPU kernels (%s): neurons run in plain torch", reason)
        return False
    return True


@cache
def library(surrogate: str | None) -> ctypes.CDLL:
    """The backward kernel of a surrogate (``source.surrogate_key``), or with None all the other kernels.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    loaded = load((surrogate_macros(surrogate) if surrogate is not None else "") + source(), "neuron")
    for name in FUNCTIONS if surrogate is None else ("backward",):
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_int, ctypes.c_int, *(TYPES[kind] for _, kind in fields())]
        function.restype = None
    return loaded


def load(code: str, name: str) -> ctypes.CDLL:
    """A library of ``code``, from the cache or compiled now; ``name`` is the beginning of its file's name.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler on PATH")
    key = hashlib.sha256(
        "\n".join([code, *FLAGS, _compiler_version(compiler), _processor()]).encode()
    ).hexdigest()
    path = cache_folder() / f"{name}_{key[:24]}.so"
    if not path.exists():
        with _lock(path.with_suffix(".lock")):
            if not path.exists():
                _build(code, path)
    return ctypes.CDLL(str(path))


def call(name: str, dtype: torch.dtype, surrogate: str | None, values: list[int | float | None]) -> None:
    """Run a kernel on CPU memory; ``values`` are its arguments, in the order of ``source.fields()``."""
    kind = list(SCALARS.values()).index(scalar_of(dtype))
    getattr(library(surrogate), name)(kind, torch.get_num_threads(), *values)


def _build(code: str, path: Path) -> None:
    """Compile ``code`` to the shared library ``path``, which appears whole or not at all."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder, _ninja_on_path():
        file = Path(folder) / "source.cpp"
        file.write_text(code, encoding="utf-8")
        try:
            cpp_extension.load(
                path.stem,
                [str(file)],
                extra_cflags=[*FLAGS, "-Wno-unknown-pragmas"],
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
                verbose=False,
            )
        except RuntimeError as error:
            raise RuntimeError(f"the C++ compiler failed: {error}") from error
        os.replace(Path(folder) / f"{path.stem}.so", path)


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
def _lock(path: Path) -> Iterator[None]:
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
