"""``scalesnn launch``: start a training on this machine, on the hosts of a file, or on Slurm.

It puts together the command line of torchrun, the DeepSpeed launcher or sbatch and runs it; ``--dry-run``
prints it. Flags that are not its own go to the training, which is asked beforehand whether it knows them: a
job does not wait in a queue for hours to fail by a slip of the pen.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scalesnn
from scalesnn.base import UserError
from scalesnn.threads import choose_wait_policy

__all__ = ["Launch", "add_launch_command", "plan_launch", "read_hostfile"]

ROOT = Path(scalesnn.__file__).resolve().parents[1]
EXAMPLES = """examples:
  scalesnn launch --devices 8 --data-path /data/imagenet
  scalesnn launch --hostfile hosts --deepspeed_config configs/zero2.json --data-path /data/imagenet
  scalesnn launch --slurm --nodes 4 --devices 8 --partition gpu --time 24:00:00 --data-path /data/imagenet
"""


@dataclass(frozen=True)
class Launch:
    """What will run.

    Attributes:
        comment: how many processes there will be, for people.
        command: the words of the command.
        path: folder that PATH must begin with, None where it holds it already.
        script: text of the batch script, None outside Slurm.
        script_path: where it is written.
    """

    comment: str
    command: tuple[str, ...]
    path: str | None = None
    script: str | None = None
    script_path: Path | None = None

    def text(self) -> str:
        """What ``--dry-run`` prints: lines that a shell could run."""
        lines = [f"# {self.comment}"]
        if self.script is not None:
            lines += [f"# {self.script_path}:", self.script]
        prefix = f"PATH={shlex.quote(self.path)}:$PATH " if self.path else ""
        return "\n".join([*lines, prefix + shlex.join(self.command)])

    def run(self) -> int:
        """Run it; returns the exit code of the launcher (for Slurm: of the submission)."""
        if self.script is not None and self.script_path is not None:
            if not shutil.which("sbatch"):
                raise UserError(
                    "there is no sbatch on this machine: call this on a login node, or --dry-run it"
                )
            self.script_path.parent.mkdir(parents=True, exist_ok=True)
            self.script_path.write_text(self.script, encoding="utf-8")
        environ = dict(os.environ)
        if self.script is None:  # else it runs on other machines
            choose_wait_policy(environ)
        if self.path:
            environ["PATH"] = f"{self.path}:{environ.get('PATH', '')}"
        try:
            return subprocess.call(self.command, env=environ)
        except FileNotFoundError:
            raise UserError(f"{self.command[0]} is not on this machine") from None
        except KeyboardInterrupt:
            return 130


def add_launch_command(subparsers: Any) -> None:
    """Define ``scalesnn launch`` below ``argparse``'s ``add_subparsers()``."""
    parser = subparsers.add_parser(
        "launch",
        help="start a training here, on hosts, or on Slurm",
        description=(__doc__ or "").split("\n\n", 1)[1],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", type=int, metavar="N", help="processes per machine (default: its GPUs, else 1)")
    add("--nodes", type=int, metavar="N", help="machines, of Slurm or of the host file (default: 1; all)")
    add("--script", metavar="FILE", help="a training of your own (default: launch/train.py)")
    add("--max-restarts", type=int, default=0, metavar="N", help="after a failure start again, so often")
    add("--dry-run", action="store_true", help="print what would run, and run nothing")
    hosts = parser.add_argument_group("hosts, by DeepSpeed's launcher over ssh (pdsh)")
    hosts.add_argument("--hostfile", metavar="FILE", help="lines of the form 'HOST slots=N'")
    hosts.add_argument("--master-addr", metavar="HOST", help="of the first host, as the others reach it")
    hosts.add_argument("--master-port", type=int, metavar="PORT", help="(default: 29500)")
    hosts.add_argument("--no-ssh-check", action="store_true", help="do not try ssh to the first host")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--slurm", action="store_true", help="write a batch script and submit it")
    for name in ("partition", "account", "qos", "time", "constraint", "reservation", "nodelist", "exclude"):
        slurm.add_argument(f"--{name}", metavar="X", help=f"as sbatch's --{name}")
    slurm.add_argument("--cpus", type=int, metavar="N", help="processors per device (default: whole nodes)")
    slurm.add_argument("--job-name", default="scalesnn", metavar="NAME", help="(default: scalesnn)")
    slurm.add_argument("--notice", type=int, default=120, metavar="S", help="signal before the time limit")

    def parse_known_args(
        words: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        known, rest = argparse.ArgumentParser.parse_known_args(parser, words, namespace)
        known.arguments = rest[1:] if rest[:1] == ["--"] else rest
        return known, []

    parser.parse_known_args = parse_known_args
    parser.set_defaults(run=run_launch)


def run_launch(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    launch = plan_launch(args)
    if args.dry_run:
        print(launch.text())
        return 0
    print(f"scalesnn: {launch.comment}", file=sys.stderr)
    return launch.run()


def plan_launch(args: argparse.Namespace) -> Launch:
    """Find out what to run.

    Raises:
        UserError: flags that contradict each other, a bad host file, or flags that the training does not
            know.
    """
    for flag in ("devices", "nodes", "cpus", "master_port"):
        least = 0 if flag == "devices" and args.slurm else 1
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts must be at least 0, got {args.max_restarts}")
    if args.slurm and args.hostfile:
        raise UserError("--slurm and --hostfile are two ways to start a training; give one of them")
    if not args.slurm and not args.hostfile and (args.nodes or 1) > 1:
        raise UserError(f"--nodes {args.nodes} needs --slurm or --hostfile FILE: which machines?")
    batch = images_per_process(args.arguments) if args.script is None else None
    if args.slurm:
        return plan_slurm(args, batch)
    if args.hostfile:
        return plan_hosts(args, batch)
    return plan_here(args, batch)


def images_per_process(arguments: list[str]) -> int:
    """Ask the training's parser and hooks; a flag or name that they do not know ends it with exit code 2.

    Raises:
        UserError: a name that no hook knows, such as an optimizer's.
    """
    from scalesnn.model.train_imagenet_example import SResNetTrainer
    from scalesnn.training.hook_checks import check_hooks

    trainer = SResNetTrainer()
    settings = trainer.get_args_parser().parse_args(arguments)
    check_hooks(trainer, settings)
    return int(settings.batch_size * settings.gradient_accumulation)


def describe(nodes: int, devices: int, batch: int | None) -> str:
    """``4 nodes × 8 devices = 32 processes, 1024 images a step``."""
    text = f"{nodes} node{'s' * (nodes > 1)} × {devices} device{'s' * (devices > 1)}"
    text += f" = {nodes * devices} process{'es' * (nodes * devices > 1)}"
    return text if batch is None else f"{text}, {nodes * devices * batch} images a step"


def training(args: argparse.Namespace) -> list[str]:
    """The words after python: the script and its flags."""
    if args.script is not None:
        if not Path(args.script).is_file():
            raise UserError(f"--script {args.script}: there is no such file")
        return [args.script, *args.arguments]
    script = ROOT / "launch" / "train.py"
    words = [str(script)] if script.is_file() else ["-m", "scalesnn.model.train_imagenet_example"]
    return [*words, *args.arguments]


def environment_folder() -> str | None:
    """The folder of this python, where PATH does not hold it: DeepSpeed looks there for ninja."""
    folder = str(Path(sys.executable).parent)
    return None if folder in os.environ.get("PATH", "").split(":") else folder


def plan_here(args: argparse.Namespace, batch: int | None) -> Launch:
    """torchrun on this machine; python itself for one process."""
    devices = args.devices or count_gpus() or 1
    command = [sys.executable]
    if devices > 1 or args.max_restarts:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
        if args.max_restarts:
            command += ["--max-restarts", str(args.max_restarts)]
    return Launch(describe(1, devices, batch), (*command, *training(args)), environment_folder())


def count_gpus() -> int:
    """GPUs that torch sees here."""
    import torch

    return torch.cuda.device_count()


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host, in the file's order, from DeepSpeed's form: ``HOST slots=N``, # begins a comment.

    Raises:
        UserError: the file cannot be read, or a line is not of that form; the message has the line's number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--hostfile {path}: {error.strerror}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        found = re.fullmatch(r"([\w.:-]+)\s+slots=(\d+)", words)
        if not found or int(found[2]) < 1:
            raise UserError(
                f"--hostfile {path}, line {number}: expected 'HOST slots=N', got {line.strip()!r}"
            )
        if found[1] in hosts:
            raise UserError(f"--hostfile {path}, line {number}: {found[1]} stands there twice")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"--hostfile {path} names no host")
    return hosts


def plan_hosts(args: argparse.Namespace, batch: int | None) -> Launch:
    """DeepSpeed's launcher over pdsh; it sets what scalesnn needs for every strategy."""
    if args.max_restarts:
        raise UserError("--max-restarts works on this machine and with --slurm, not with --hostfile")
    hosts = read_hostfile(args.hostfile)
    nodes = args.nodes or len(hosts)
    if nodes > len(hosts):
        raise UserError(f"--nodes {nodes}, but {args.hostfile} has {len(hosts)} host(s)")
    used = dict(list(hosts.items())[:nodes])
    if args.devices:
        few = [f"{host} slots={slots}" for host, slots in used.items() if slots < args.devices]
        if few:
            raise UserError(f"--devices {args.devices}, but {args.hostfile} has {', '.join(few)}")
    elif len(set(used.values())) > 1:
        raise UserError(f"{args.hostfile} gives hosts different slots; give --devices {min(used.values())}")
    devices = args.devices or next(iter(used.values()))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", args.hostfile]
    command += ["--launcher", "pdsh"]
    if nodes < len(hosts):
        command += ["--num_nodes", str(nodes)]
    if args.devices:
        command += ["--num_gpus", str(devices)]
    if nodes == 1 and not is_here(next(iter(used))):
        command.append("--force_multi")  # one host, but not this one
    if args.master_addr:
        command += ["--master_addr", args.master_addr]
    if args.master_port:
        command += ["--master_port", str(args.master_port)]
    if args.no_ssh_check:
        command.append("--no_ssh_check")
    words = training(args)
    if words[0] == "-m":
        words = ["--module", *words[1:]]
    return Launch(describe(nodes, devices, batch), (*command, *words), environment_folder())


def is_here(host: str) -> bool:
    """Whether ``host`` names this machine."""
    return host in ("localhost", socket.gethostname(), socket.getfqdn()) or host.startswith("127.0.0.1")


def plan_slurm(args: argparse.Namespace, batch: int | None) -> Launch:
    """A batch script that srun starts the training from, and its submission."""
    library = ROOT / "launch" / "slurm" / "job.sh"
    if not library.is_file():
        raise UserError(f"--slurm needs the checkout's launch/slurm/job.sh, and {library} is not there")
    if args.devices is None:
        raise UserError("--slurm needs --devices N: GPUs per node (0 for nodes without)")
    nodes, devices = args.nodes or 1, args.devices
    wishes = {"job-name": args.job_name, "nodes": nodes}
    if devices:
        wishes["gpus-per-node"] = devices
    if args.cpus:
        wishes |= {"ntasks-per-node": max(1, devices), "cpus-per-task": args.cpus}
    for name in ("partition", "account", "qos", "time", "constraint", "reservation", "nodelist", "exclude"):
        if getattr(args, name):
            wishes[name] = getattr(args, name)
    wishes |= {"signal": f"USR1@{args.notice}", "open-mode": "append", "output": "%x-%j.out"}
    options = [f"--{name}={value}" for name, value in wishes.items()]
    options += ["--requeue"] + ([] if args.cpus else ["--exclusive"])
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options)]
    lines += ["# Written by scalesnn launch; submit it again with sbatch.", "set -euo pipefail"]
    lines.append(f"root={shlex.quote(str(ROOT))}")
    lines.append('source "$root/launch/slurm/job.sh"')
    lines.append(f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    if args.max_restarts:
        lines.append(f"RESTARTS=${{RESTARTS:-{args.max_restarts}}}")
    lines.append(f"run python -u {shlex.join(training(args))}")
    path = Path(f"{args.job_name}.sbatch")
    return Launch(
        describe(nodes, max(1, devices), batch),
        ("sbatch", str(path)),
        script="\n".join(lines) + "\n",
        script_path=path,
    )
