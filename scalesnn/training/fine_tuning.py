"""``--freeze PATTERN`` and ``--lr-scale PATTERN=FACTOR``: which parameters learn, and how fast.

Patterns are those of a shell (``fnmatch``) on the names of parameters: ``layer1.*``, ``*.bn?.weight``. Of
several that match, the last one holds.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from scalesnn.base import UserError

__all__ = ["check_fine_tuning", "describe_fine_tuning", "freeze", "rate_factors"]


def check_fine_tuning(args: Any) -> None:
    """Refuse an ``--lr-scale`` that is not PATTERN=FACTOR.

    Raises:
        UserError: names what was given and what is expected.
    """
    for text in args.lr_scale:
        pattern, _, factor = text.rpartition("=")
        try:
            value = float(factor)
        except ValueError:
            pattern, value = "", 0.0
        if not pattern:
            raise UserError(f"--lr-scale: expected PATTERN=FACTOR such as 'layer1.*=0.1', got {text!r}")
        if not 0 < value < float("inf"):
            raise UserError(
                f"--lr-scale {text}: the factor must be above 0; what shall not learn takes --freeze"
            )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters that match keep their values; call it before a strategy takes the network over.

    A BatchNorm of which every parameter is frozen keeps its running statistics and normalises with them, in
    training as in evaluation: otherwise the frozen layers would not compute what they did.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    if not patterns:
        return
    names = dict(model.named_parameters())
    for name in matching("--freeze", patterns, names):
        names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves no parameter to train")
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()
            module.train = MethodType(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """``module.train`` of a layer that stays in evaluation mode."""
    return type(module).train(module, False)


def rate_factors(model: nn.Module, scales: Sequence[str]) -> dict[str, float]:
    """The factor of ``--lr-scale`` for every parameter that has one, by name.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    factors: dict[str, float] = {}
    for text in scales:
        pattern, _, factor = text.rpartition("=")
        factors.update(dict.fromkeys(matching("--lr-scale", [pattern], names), float(factor)))
    return factors


def matching(flag: str, patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that a pattern matches.

    Raises:
        UserError: a pattern matches none; names what is near.
    """
    found: list[str] = []
    for pattern in patterns:
        own = [name for name in names if fnmatchcase(name, pattern)]
        if not own:
            raise UserError(
                f"{flag} {pattern}: no parameter has such a name; the nearest: {near(pattern, names)}"
            )
        found += own
    return found


def near(pattern: str, names: Iterable[str]) -> str:
    """Up to three patterns that match something and are like ``pattern``."""
    names = list(names)
    parts = (name.split(".") for name in names)
    modules = dict.fromkeys(".".join(p[:i]) for p in parts for i in range(1, len(p)))
    plain = pattern.rstrip(".*")
    if plain in modules:
        return f"'{plain}.*'"
    known = {**{name: name for name in names}, **{module: f"{module}.*" for module in modules}}
    alike = difflib.get_close_matches(plain, list(known), n=3, cutoff=0.3) or list(known)[:3]
    return ", ".join(f"'{known[name]}'" for name in alike)


def describe_fine_tuning(args: Any, model: nn.Module) -> dict[str, str]:
    """What the summary of a run says of frozen parameters and scaled learning rates."""
    facts = {}
    parameters = dict(model.named_parameters())
    frozen = [p for p in parameters.values() if not p.requires_grad]
    if getattr(args, "freeze", None):
        norms = sum("train" in vars(module) for module in model.modules() if isinstance(module, _BatchNorm))
        values = sum(p.numel() for p in frozen), sum(p.numel() for p in parameters.values())
        facts["frozen"] = (
            f"{len(frozen)} of {len(parameters)} parameters, {values[0]:,} of {values[1]:,} values; "
            f"{norms} BatchNorm{'s keep their' if norms != 1 else ' keeps its'} running statistics"
        )
    if getattr(args, "lr_scale", None):
        factors = rate_factors(model, args.lr_scale)
        counts = Counter(factors.get(name, 1.0) for name, p in parameters.items() if p.requires_grad)
        rates = (
            f"{args.lr * factor:g} for {counts[factor]} parameters" for factor in sorted(counts, reverse=True)
        )
        facts["rates"] = ", ".join(rates)
    return facts
