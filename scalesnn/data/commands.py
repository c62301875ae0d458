"""``scalesnn data check | pack | index | subset | imagenet``."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from scalesnn.base import UserError
from scalesnn.data.check import add_check_command
from scalesnn.data.imagenet import add_imagenet_command
from scalesnn.data.pack import add_index_command, add_pack_command
from scalesnn.data.subset import add_subset_command

__all__ = ["add_data_command"]

Run = Callable[[argparse.Namespace], int]


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _stoppable(run: Run) -> Run:
    """``run``, which Ctrl-C and SIGTERM end as exceptions do: half-made files are removed on the way out.
    What the file system refuses is the user's to mend."""

    @functools.wraps(run)
    def stopped(args: argparse.Namespace) -> int:
        if threading.current_thread() is not threading.main_thread():
            return run(args)
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return run(args)
        except KeyboardInterrupt:
            print("scalesnn: stopped", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:
            raise
        except OSError as error:  # a folder that may not be written to, a full disk
            where = f"{error.filename}: " if error.filename else ""
            raise UserError(f"{where}{error.strerror or error}") from error
        finally:
            signal.signal(signal.SIGTERM, before)

    return stopped


def add_data_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` and its commands; each sets ``run``, a function of the parsed arguments that returns the
    exit code."""
    parser = commands.add_parser("data", help="check, pack, index, subset or unpack data")
    below = parser.add_subparsers(title="data commands", metavar="COMMAND", required=True)
    for add in (
        add_check_command,
        add_pack_command,
        add_index_command,
        add_subset_command,
        add_imagenet_command,
    ):
        add(below)
    for command in below.choices.values():
        command.set_defaults(run=_stoppable(command.get_default("run")))
