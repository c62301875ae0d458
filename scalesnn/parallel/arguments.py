"""The flags of parallel training, and the choice of a strategy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from scalesnn.base import UserError
from scalesnn.parallel.strategy import Strategy
from scalesnn.parallel.topology import Topology

__all__ = ["STRATEGIES", "add_parallel_arguments", "choose_strategy", "create_strategy"]


def _single() -> type[Strategy]:
    from scalesnn.parallel.single import SingleStrategy

    return SingleStrategy


def _ddp() -> type[Strategy]:
    from scalesnn.parallel.ddp import DDPStrategy

    return DDPStrategy


def _deepspeed() -> type[Strategy]:
    from scalesnn.parallel.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy


def _fsdp() -> type[Strategy]:
    from scalesnn.parallel.fsdp import FSDPStrategy

    return FSDPStrategy


LONGEST_TIMEOUT = 7 * 24 * 60  # minutes
# Each is imported only when it is chosen: DeepSpeed alone takes seconds.
STRATEGIES: dict[str, Callable[[], type[Strategy]]] = {
    "single": _single,
    "ddp": _ddp,
    "deepspeed": _deepspeed,
    "fsdp": _fsdp,
}


def add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """Define every flag of ``scalesnn.parallel``."""
    group = parser.add_argument_group("parallel training")
    group.add_argument(
        "--strategy",
        default="auto",
        metavar="NAME",
        help="auto, single, ddp, deepspeed or fsdp; auto: deepspeed with --deepspeed_config, fsdp with "
        "--fsdp-config, else ddp for several processes and single for one",
    )
    group.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        default=None,
        metavar="JSON",
        help="DeepSpeed's configuration, a file or a shipped one such as zero2",
    )
    group.add_argument(
        "--deepspeed", action="store_true", help="the same as --strategy deepspeed; needs --deepspeed_config"
    )
    group.add_argument(
        "--fsdp-config",
        default=None,
        metavar="YAML",
        help="FSDP2's configuration, a file or a shipped one: fsdp, hsdp",
    )
    group.add_argument(
        "--local_rank", "--local-rank", default=None, type=int, metavar="N", help="set by launchers; checked"
    )
    group.add_argument(
        "--world-size",
        default=None,
        type=int,
        metavar="N",
        help="number of processes there must be",
    )
    group.add_argument("--dist-url", default="env://", metavar="URL", help="where the processes meet")
    group.add_argument(
        "--dist-timeout",
        default=10.0,
        type=float,
        metavar="MIN",
        help="minutes a rank waits for others",
    )
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all ranks")
    group.add_argument(
        "--clip-grad-norm", default=None, type=float, metavar="NORM", help="largest norm of the gradients"
    )
    group.add_argument(
        "--gradient-accumulation", default=1, type=int, metavar="N", help="batches per update of the weights"
    )
    group.add_argument("--verbose", action="store_true", help="show DeepSpeed's own messages")
    group.add_argument(
        "--on-nan",
        default="stop",
        metavar="stop|skip",
        help="when the loss is not finite: stop with a report, or leave the batch out on all ranks",
    )
    group.add_argument(
        "--ddp-static-graph", action="store_true", help="DDP: the same parameters take part in every step"
    )
    group.add_argument("--ddp-bf16-gradients", action="store_true", help="DDP: gradients travel as bfloat16")
    group.add_argument(
        "--ddp-broadcast-buffers", action="store_true", help="DDP: rank 0's running statistics at every step"
    )


def choose_strategy(args: Any, topology: Topology) -> str:
    """The name of the strategy that the flags ask for.

    Raises:
        UserError: an unknown name, or flags that contradict each other.
    """
    name: str = args.strategy
    if name not in ("auto", *STRATEGIES):
        raise UserError(f"--strategy: unknown {name!r} (known: auto, {', '.join(STRATEGIES)})")
    wishes = {
        "deepspeed": "--deepspeed_config"
        if args.deepspeed_config
        else "--deepspeed"
        if args.deepspeed
        else None
    }
    wishes["fsdp"] = "--fsdp-config" if args.fsdp_config else None
    for wish, flag in wishes.items():
        if flag and name not in ("auto", wish):
            raise UserError(f"{flag} asks for {wish}, but --strategy says {name}; leave one of them out")
    wanted = [wish for wish, flag in wishes.items() if flag]
    if len(wanted) > 1:
        raise UserError(
            f"{wishes['deepspeed']} and --fsdp-config ask for two strategies; leave one of them out"
        )
    if name == "auto":
        name = wanted[0] if wanted else "ddp" if topology.world_size > 1 else "single"
    if name == "deepspeed" and not args.deepspeed_config:
        raise UserError("DeepSpeed needs --deepspeed_config JSON, for instance --deepspeed_config zero2")
    return name


def create_strategy(args: Any, topology: Topology) -> Strategy:
    """Make the strategy that the flags ask for.

    Where a DeepSpeed JSON sets something that a flag sets too, ``args`` takes the JSON's value if the flag
    was left at its default; if the user gave both (``args.explicit``) and they differ, that is an error.

    Raises:
        UserError: flags that contradict each other, the JSON or the number of processes.
    """
    if args.gradient_accumulation < 1:
        raise UserError(f"--gradient-accumulation must be at least 1, got {args.gradient_accumulation}")
    if args.clip_grad_norm is not None and not args.clip_grad_norm >= 0:
        raise UserError(f"--clip-grad-norm must be 0 or more, got {args.clip_grad_norm}")
    if not 0 < args.dist_timeout <= LONGEST_TIMEOUT:
        raise UserError(
            f"--dist-timeout must be above 0 and at most {LONGEST_TIMEOUT} minutes, got {args.dist_timeout}"
        )
    if args.on_nan not in ("stop", "skip"):
        raise UserError(f"--on-nan must be stop or skip, got {args.on_nan!r}")
    if args.world_size is not None and args.world_size != topology.world_size:
        raise UserError(
            f"--world-size {args.world_size}, but {topology.world_size} process(es) were started "
            f"(by {topology.source}); start as many, or leave the flag out"
        )
    name = choose_strategy(args, topology)
    for flag in ("ddp_static_graph", "ddp_bf16_gradients", "ddp_broadcast_buffers"):
        if getattr(args, flag) and name != "ddp":
            raise UserError(f"--{flag.replace('_', '-')} is for --strategy ddp, this run has {name}")
    return STRATEGIES[name]()(args, topology)
