"""The command ``scalesnn doctor``, and ``--preflight``, which does the same before a training."""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

from scalesnn.base import UserError
from scalesnn.doctor.compare import compare
from scalesnn.doctor.findings import Report, exit_code, print_table
from scalesnn.doctor.local import Settings, look_at_this_machine
from scalesnn.doctor.together import examine_together, join_store
from scalesnn.parallel.topology import Topology

__all__ = ["add_doctor_command", "add_preflight_argument", "examine", "run_preflight"]


def add_doctor_command(subparsers: Any) -> None:
    """Define ``scalesnn doctor`` below ``argparse``'s ``add_subparsers()``."""
    parser = subparsers.add_parser(
        "doctor",
        help="check machines, data and network before a job",
        description="Check this machine; under srun, torchrun or mpirun all ranks, and the network "
        "between them. One table; exit code 1 on a problem.",
    )
    defaults = Settings()
    add = parser.add_argument
    add("--data-path", metavar="DIR", help="images, as the training gets them (default: not checked)")
    add("--output-dir", metavar="DIR", help="where runs are written (default: not checked)")
    add("--min-free", type=float, default=defaults.min_free, metavar="GIB", help="free space it needs (10)")
    add(
        "--max-skew", type=float, default=defaults.max_skew, metavar="S", help="clocks may differ so much (1)"
    )
    add("--hostfile", metavar="FILE", help="hosts of `scalesnn launch --hostfile`: do they resolve?")
    add(
        "--megabytes",
        type=float,
        default=defaults.megabytes,
        metavar="MB",
        help="all-reduced between two nodes (64; 0: no network test)",
    )
    add("--timeout", type=float, default=defaults.timeout, metavar="S", help="wait so long for ranks (120)")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    settings = Settings(
        args.data_path,
        args.output_dir,
        args.min_free,
        args.max_skew,
        args.hostfile,
        args.megabytes,
        args.timeout,
    )
    for flag in ("min_free", "max_skew", "megabytes"):
        if not getattr(args, flag) >= 0:
            raise UserError(f"--{flag.replace('_', '-')} must be 0 or more, got {getattr(args, flag)}")
    if not args.timeout > 0:
        raise UserError(f"--timeout must be more than 0, got {args.timeout}")
    return examine(Topology.from_environment(), settings)


def examine(topology: Topology, settings: Settings, store: Any = None) -> int:
    """Make every check and print the table on rank 0; every rank must call it.

    Args:
        store: where the ranks have met already; None to meet at the master's address.

    Returns:
        the exit code: 0, or 1 where something fails.
    """
    report = look_at_this_machine(topology, settings)
    if topology.world_size == 1:
        findings = compare([report], settings)
        print_table(findings, report.done, {0: report.host})
        return exit_code(findings)
    if store is None:
        store = meet(topology, settings, report)
        if store is None:  # cut off from the others: say here what is known here
            print_table(report.findings, report.done, {report.rank: report.host})
            return 1
    code, findings, done, places = examine_together(topology, settings, report, store)
    if topology.is_main:
        print_table(findings, done, places)
    return code


def meet(topology: Topology, settings: Settings, report: Report) -> Any:
    """The store of all ranks; None, with a finding, where the first node cannot be reached."""
    where = f"{topology.master_addr}:{topology.master_port}"
    report.done.append("names")
    try:
        socket.getaddrinfo(topology.master_addr, topology.master_port)
    except OSError as error:
        report.add("names", "fail", f"{topology.master_addr} (MASTER_ADDR): {error.strerror}",
                   "add the name to DNS or /etc/hosts on this node, or export MASTER_ADDR as an IP "
                   "address")  # fmt: skip
        return None
    try:
        return join_store(topology, settings, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no answer"])[0]
        busy = topology.is_main and "EADDRINUSE" in str(error)
        report.add("ports", "fail", f"{'the port is taken' if busy else 'cannot reach'} {where}: {reason}",
                   "give another MASTER_PORT" if busy else
                   "is rank 0 running there? open the port between the nodes (firewall), or set "
                   "MASTER_ADDR to "
                   "the first node")  # fmt: skip
        return None


def add_preflight_argument(parser: argparse.ArgumentParser) -> None:
    """Define ``--preflight``."""
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="first check machines, data and network, as `scalesnn doctor`",
    )


def run_preflight(args: Any, topology: Topology, store: Any = None) -> None:
    """The doctor before a training; call it on all ranks once the process group is up.

    Args:
        args: with data_path and output_dir.
        store: the store that the process group was made with.

    Raises:
        SystemExit: with code 1, on all ranks, where something fails.
    """
    if store is None and topology.world_size > 1:
        raise UserError("--preflight needs the store of the process group")
    settings = Settings(args.data_path or None, args.output_dir)
    if examine(topology, settings, store):
        raise SystemExit(1)
