"""``scalesnn evaluate``, ``predict`` and ``energy``; what they need is imported when one of them runs."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

__all__ = ["add_energy_command", "add_evaluate_command", "add_predict_command"]


def _add(subparsers: Any, name: str, help_text: str) -> None:
    """Define a command whose words its module's ``run_words`` takes, -h included."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help_text, add_help=False, prefix_chars="\0"
    )
    parser.add_argument("words", nargs="*")

    def run(args: argparse.Namespace) -> int:
        return int(import_module(f"scalesnn.evaluation.{name}").run_words(args.words))

    parser.set_defaults(run=run)


def add_evaluate_command(subparsers: Any) -> None:
    """Define ``scalesnn evaluate``."""
    _add(subparsers, "evaluate", "accuracy of a trained net, for several T")


def add_predict_command(subparsers: Any) -> None:
    """Define ``scalesnn predict``."""
    _add(subparsers, "predict", "the five best classes of images")


def add_energy_command(subparsers: Any) -> None:
    """Define ``scalesnn energy``."""
    _add(subparsers, "energy", "operations and energy of a trained net, layer by layer")
