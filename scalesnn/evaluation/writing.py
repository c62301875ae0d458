"""Files that a command writes because a flag names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scalesnn.base import UserError

__all__ = ["check_writable", "opened"]


def check_writable(path: str | None, flag: str) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Raises:
        UserError: its folder does not exist or may not be written to, or it is a folder itself.
    """
    if path is None:
        return
    file = Path(path).expanduser()
    problem = None
    if file.is_dir():
        problem = "it is a folder"
    elif not file.absolute().parent.is_dir():
        problem = f"there is no folder {file.parent}"
    elif not os.access(file.absolute().parent, os.W_OK):
        problem = f"{file.parent} may not be written to"
    if problem:
        raise UserError(f"{flag} {path}: cannot be written ({problem})")


def opened(path: str, flag: str) -> Any:
    """A text file to be written, UTF-8.

    Raises:
        UserError: it cannot be; the line names the flag.
    """
    try:
        return Path(path).expanduser().open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None
