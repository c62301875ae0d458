"""Optimizers, learning-rate schedules and the parameter groups that they work on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from scalesnn.training.hook_checks import check_optimizer, check_schedule

__all__ = ["make_optimizer", "make_scheduler", "parameter_groups"]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    norm_weight_decay: float | None,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Split the parameters that are trained by their learning rate and weight decay.

    Args:
        norm_weight_decay: of normalisation layers; None: as of all others.
        rates: learning rates of the parameters that do not have the optimizer's, by name.

    Returns:
        first the groups with the optimizer's rate: one where ``norm_weight_decay`` is None, else
        (normalisation layers, all others); then those of each other rate, with ``"lr"``.
    """
    norms = (
        nn.modules.batchnorm._BatchNorm,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.instancenorm._InstanceNorm,
    )
    decays = {True: norm_weight_decay, False: weight_decay}
    normal = set()
    if norm_weight_decay is not None:
        normal = {p for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = (rates or {}).get(name, math.inf)  # of the optimizer: in front
            groups.setdefault((-rate, parameter not in normal), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": decays[not key[1]]}
        | ({} if key[0] == -math.inf else {"lr": -key[0]})
        for key in sorted(groups)
    ]


def make_optimizer(args: Any, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """``--opt`` with its flags.

    Raises:
        UserError: ``--opt`` is not one of sgd, sgd_nesterov, rmsprop, adamw.
    """
    check_optimizer(args)
    common = {"lr": args.lr, "weight_decay": args.weight_decay}
    match args.opt.lower():
        case "sgd":
            return torch.optim.SGD(parameters, momentum=args.momentum, **common)
        case "sgd_nesterov":
            return torch.optim.SGD(parameters, momentum=args.momentum, nesterov=True, **common)
        case "rmsprop":
            # eps and alpha of the Inception recipe, as torchvision's reference training takes them.
            return torch.optim.RMSprop(parameters, momentum=args.momentum, eps=0.0316, alpha=0.9, **common)
        case _:
            return torch.optim.AdamW(parameters, **common)


def make_scheduler(args: Any, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """``--lr-scheduler`` after ``--lr-warmup-epochs`` of warm-up; it is stepped once an epoch.

    Raises:
        UserError: an unknown schedule or warm-up.
    """
    check_schedule(args)
    after_warmup = max(1, args.epochs - args.lr_warmup_epochs)
    main: LRScheduler
    match args.lr_scheduler.lower():
        case "step":
            main = schedulers.StepLR(optimizer, step_size=args.lr_step_size, gamma=args.lr_gamma)
        case "cosa":
            main = schedulers.CosineAnnealingLR(optimizer, T_max=after_warmup)
        case _:
            main = schedulers.ExponentialLR(optimizer, gamma=args.lr_gamma)
    if args.lr_warmup_epochs == 0:
        return main
    warmup: LRScheduler
    match args.lr_warmup_method.lower():
        case "linear":
            warmup = schedulers.LinearLR(optimizer, args.lr_warmup_decay, total_iters=args.lr_warmup_epochs)
        case _:
            warmup = schedulers.ConstantLR(optimizer, args.lr_warmup_decay, total_iters=args.lr_warmup_epochs)
    return schedulers.SequentialLR(optimizer, [warmup, main], milestones=[args.lr_warmup_epochs])
