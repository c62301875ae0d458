"""What each rank says: rank 0 on the console, every rank in ``RUN/logs/rank_N.log``.

The other ranks' output goes to their files alone, below Python too (NCCL, gloo, C++ warnings); if one of
them ends with an error, one line on the console names the rank, its machine, the error and the file.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from scalesnn.base import UserError

__all__ = ["RankLog"]


class RankLog:
    """Send the output of this process to its place. Use as a context, once the run folder is known.

    Args:
        folder: of the run; the files are appended to, so that a resumed run keeps what was said before.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / "logs" / f"rank_{rank}.log"
        self.rank = rank
        self._console: int | None = None
        self._saved: tuple[Any, Any] = (None, None)
        self._stdout_copy: int | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> RankLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank == 0:
            self._saved = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = Both(sys.stdout, self._file), Both(sys.stderr, self._file)
        else:
            self._stdout_copy, self._console = os.dup(1), os.dup(2)
            os.dup2(self._file.fileno(), 1)
            os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        failed = error is not None and not isinstance(error, (SystemExit, UserError))
        if failed:
            traceback.print_exception(kind, error, trace, file=self._file)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank == 0:
            sys.stdout, sys.stderr = self._saved
        elif self._console is not None and self._stdout_copy is not None:
            if failed:
                os.write(self._console, (self._one_line(error) + "\n").encode())
            os.dup2(self._stdout_copy, 1)
            os.dup2(self._console, 2)
            if failed:  # the interpreter would print the whole stack again, once for each of a thousand ranks
                sys.excepthook = lambda *_: None
            os.close(self._stdout_copy)
            os.close(self._console)
        self._file.close()

    def _one_line(self, error: BaseException | None) -> str:
        said = (str(error).strip().splitlines() or [""])[0]
        return (
            f"[rank {self.rank} on {socket.gethostname()}] {type(error).__name__}: {said} (see {self.path})"
        )


class Both:
    """A text stream that also writes to a file; everything but writing is the stream's."""

    def __init__(self, stream: Any, file: IO[str]) -> None:
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        """Write to both; the file gets no lines that a progress display draws over again."""
        if not self.file.closed and "\r" not in text and "\x1b" not in text:
            self.file.write(text)
        return int(self.stream.write(text) or 0)

    def flush(self) -> None:
        """Flush both."""
        if not self.file.closed:
            self.file.flush()
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
