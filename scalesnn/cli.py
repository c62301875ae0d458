"""``scalesnn plan | doctor | import | evaluate | energy | export | …``: what one does beside training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scalesnn.base import UserError, speak_utf8

__all__ = ["command_parser", "main"]


def command_adders() -> Iterator[Callable[[Any], None]]:
    """The functions that add a command each; imported here, so that ``import scalesnn.cli`` is light."""
    from scalesnn.data.commands import add_data_command
    from scalesnn.doctor import add_doctor_command
    from scalesnn.evaluation.commands import (
        add_energy_command,
        add_evaluate_command,
        add_predict_command,
    )
    from scalesnn.exchange.export_command import add_export_command
    from scalesnn.import_command import add_import_command
    from scalesnn.launch_command import add_launch_command
    from scalesnn.memory.plan_command import add_plan_command
    from scalesnn.tracking.report import add_report_command

    yield add_data_command
    yield add_doctor_command
    yield add_energy_command
    yield add_evaluate_command
    yield add_predict_command
    yield add_export_command
    yield add_import_command
    yield add_launch_command
    yield add_plan_command
    yield add_report_command


def command_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    speak_utf8()
    parser = argparse.ArgumentParser(
        prog="scalesnn", description="Beside training: plan, check, export, report."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in command_adders():
        add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``scalesnn``; ``sys.argv[1:]`` when None.

    Returns:
        the exit code: 0 done, 1 a problem was found, 2 the command line or a file is wrong.
    """
    args = command_parser().parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"scalesnn: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "scalesnn").startswith("scalesnn"):
            raise
        print(f"scalesnn: this needs the package {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `scalesnn … | head`
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
