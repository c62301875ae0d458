"""``scalesnn plan``: what a training step will need, for every policy, before anything is launched."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesnn import functional, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.memory.arguments import bytes_of
from scalesnn.memory.planner import OPTIMIZER_STATE, STRATEGIES, Planner, gib, table
from scalesnn.memory.policy import Policy

__all__ = ["add_plan_command"]

NEURONS = {"IF": neuron.IFNode, "LIF": neuron.LIFNode, "PLIF": neuron.ParametricLIFNode}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def add_plan_command(subparsers: Any) -> None:
    """Add ``scalesnn plan``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan", help="predict memory and time of every policy", description=__doc__
    )
    parser.add_argument("--model", default="spiking_resnet18", help="spiking_resnet50, sew_resnet18, …")
    parser.add_argument("--neuron", default="IF", choices=list(NEURONS))
    parser.add_argument("--T", type=int, default=4, help="time-steps")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="per device")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--in-channels", type=int, default=3, metavar="N", help="2 for event frames (3)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--gpu-memory", default="80GiB", help="of one device, such as 80GiB")
    parser.add_argument("--strategy", default="single", choices=STRATEGIES)
    parser.add_argument("--world-size", type=int, default=1, help="devices")
    parser.add_argument("--opt", default="sgd", choices=list(OPTIMIZER_STATE))
    parser.add_argument("--model-ema", action="store_true", help="an average of the weights is kept")
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--moving", action="store_true", help="images differ from step to step (events)")
    parser.add_argument("--policy", action="append", help="only this one; may be given several times")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def makers() -> dict[str, Callable[..., nn.Module]]:
    """The functions that build a net, by name."""
    from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet

    return {
        name: getattr(module, name)
        for module in (spiking_resnet, sew_resnet, ms_resnet)
        for name in module.__all__
        if name.islower() and "resne" in name
    }


def planner_of_command(args: argparse.Namespace) -> Planner:
    """The planner that the flags describe."""
    mode = FakeTensorMode()
    with mode:
        model = makers()[args.model](
            num_classes=args.classes,
            spiking_neuron=NEURONS[args.neuron],
            surrogate_function=surrogate.ATan(),
            detach_reset=True,
            in_channels=args.in_channels,
        )
    functional.set_step_mode(model, "m")
    return Planner(
        model,
        (args.T, args.batch_size, args.in_channels, args.size, args.size),
        bytes_of(args.gpu_memory, "--gpu-memory"),
        strategy=args.strategy,
        world_size=args.world_size,
        optimizer=args.opt,
        ema=args.model_ema,
        amp_dtype=DTYPES[args.precision],
        static=not args.moving,
        mode=mode,
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON; returns 0 where a policy fits, else 1."""
    known = makers()
    if args.model not in known:
        raise UserError(f"unknown --model {args.model!r}: one of {', '.join(known)}")
    for flag in ("T", "batch_size", "size", "in_channels", "world_size", "classes"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    budget = bytes_of(args.gpu_memory, "--gpu-memory")
    planner = planner_of_command(args)
    policies = [Policy.parse(text) for text in args.policy] if args.policy else planner.policies()
    plans = [planner.plan(policy) for policy in policies]
    if args.json:
        record = {key: value for key, value in vars(args).items() if key not in ("run", "json")}
        print(json.dumps({**record, "budget": budget, "policies": [p.as_dict() for p in plans]}, indent=1))
    else:
        print(
            f"{args.model}, T = {args.T}, {args.batch_size} images of {args.size}², {args.precision}, "
            f"{args.strategy} on {args.world_size} device(s) of {gib(budget)}\n"
        )
        print(table(plans))
    return 0 if any(plan.fits for plan in plans) else 1
