"""``scalesnn data check | pack | index``."""

from __future__ import annotations

import argparse

from scalesnn.data.check import add_check_command
from scalesnn.data.pack import add_index_command, add_pack_command

__all__ = ["add_data_command"]


def add_data_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` and its commands; each sets ``run``, a function of the parsed arguments that returns the
    exit code."""
    parser = commands.add_parser("data", help="check, pack or index a data folder")
    below = parser.add_subparsers(title="data commands", metavar="COMMAND", required=True)
    add_check_command(below)
    add_pack_command(below)
    add_index_command(below)
