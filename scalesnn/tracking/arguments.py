"""The command line of tracking: what is logged, how often, and to whom."""

from __future__ import annotations

import argparse
import os

__all__ = ["WANDB_MODES", "add_tracking_arguments"]

WANDB_MODES = ("online", "offline", "disabled")


def add_tracking_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of tracking to ``parser``.

    ``--wandb`` takes its default from the environment variable WANDB_MODE where that holds one of the
    three modes, else ``online``; online falls back to offline by itself (see ``tracking.wandb_sink``).
    """
    group = parser.add_argument_group("tracking")
    mode = os.environ.get("WANDB_MODE", "")
    group.add_argument(
        "--wandb",
        choices=WANDB_MODES,
        default=mode if mode in WANDB_MODES else "online",
        help="Weights & Biases; online turns into offline by itself where no key is configured or the "
        "server does not answer (from WANDB_MODE if set)",
    )
    group.add_argument("--wandb-project", default="scalesnn", help="W&B project")
    group.add_argument("--wandb-entity", default=None, help="W&B team or user; yours if not given")
    group.add_argument(
        "--wandb-name", default=None, help="W&B name of the run; its folder's name if not given"
    )
    group.add_argument("--wandb-group", default=None, help="W&B group of the run")
    group.add_argument("--wandb-tags", nargs="*", default=[], metavar="TAG", help="W&B tags of the run")
    group.add_argument("--wandb-notes", default=None, help="W&B notes of the run")
    group.add_argument(
        "--wandb-log-model", action="store_true", help="store the latest and best checkpoint as W&B artifacts"
    )
    group.add_argument("--metrics-every", type=int, default=10, metavar="N", help="log every N steps")
    group.add_argument(
        "--spike-metrics-every",
        type=int,
        default=100,
        metavar="N",
        help="measure firing rates, dead channels, membranes and energy every N steps; 0: never",
    )
    group.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="record N steps with torch.profiler into RUN/profile and print the costliest operators",
    )
