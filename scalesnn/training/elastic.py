"""The same batch on any number of devices: what lets a job go on with fewer nodes, or more."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from scalesnn.base import UserError

__all__ = ["add_elastic_arguments", "apply_global_batch"]


def add_elastic_arguments(parser: ArgumentParser) -> None:
    """Define ``--global-batch``."""
    parser.add_argument_group("elastic").add_argument(
        "--global-batch",
        default=None,
        type=int,
        metavar="N",
        help="images per update over all devices; --gradient-accumulation follows from it, so a job that "
        "resumes on fewer or more devices takes the same steps",
    )


def apply_global_batch(args: Any, world_size: int) -> None:
    """Set ``args.gradient_accumulation`` so that one update sees ``args.global_batch`` images.

    Call it before the strategy is made. Without --global-batch nothing changes.

    Raises:
        UserError: the batch does not divide; the message names batch sizes that do.
    """
    wanted = args.global_batch
    if wanted is None:
        return
    if wanted < 1:
        raise UserError(f"--global-batch must be at least 1, got {wanted}")
    at_once = args.batch_size * world_size
    if wanted % at_once:
        each, rest = divmod(wanted, world_size)
        if rest:
            cure = f"{world_size} devices cannot share {wanted} images evenly"
        else:
            fits = [n for n in range(1, each + 1) if each % n == 0]
            near = sorted(fits, key=lambda n: (n > args.batch_size, abs(n - args.batch_size)))[:3]
            cure = f"--batch-size {' or '.join(map(str, sorted(near)))} would do"
        raise UserError(
            f"--global-batch {wanted} is not a multiple of --batch-size {args.batch_size} × "
            f"{world_size} devices "
            f"= {at_once}: {cure}"
        )
    steps = wanted // at_once
    given: set[str] = getattr(args, "explicit", set())
    if "gradient_accumulation" in given and args.gradient_accumulation != steps:
        raise UserError(
            f"--gradient-accumulation {args.gradient_accumulation} contradicts --global-batch {wanted}: "
            f"with --batch-size {args.batch_size} on {world_size} devices it is {steps}; leave it out"
        )
    args.gradient_accumulation = steps
