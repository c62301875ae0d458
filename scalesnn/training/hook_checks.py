"""Checks of the flags that a Trainer's hooks read: a hook that a subclass overrides decides what it takes.

A default hook checks its flags when it is called. It is also marked with that check, so that a run which
will call it is refused before any long work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from scalesnn.base import UserError
from scalesnn.training.arguments import OPTIMIZERS, SCHEDULERS, WARMUPS, nearest

__all__ = ["check_hooks", "check_name", "check_optimizer", "check_schedule", "refuses", "uses_default"]

Hook = TypeVar("Hook", bound=Callable[..., Any])


def refuses(check: Callable[[Any], None]) -> Callable[[Hook], Hook]:
    """Mark a default hook with ``check(args)``, which raises a UserError for what the hook would refuse."""

    def mark(hook: Hook) -> Hook:
        hook.check = check  # type: ignore[attr-defined]
        return hook

    return mark


def uses_default(hook: Callable[..., Any]) -> bool:
    """Whether a marked hook is the default one, which no subclass overrides."""
    return hasattr(hook, "check")


def check_hooks(trainer: Any, args: Any) -> None:
    """Refuse at once what the default hooks would refuse later.

    A hook that a subclass overrides has no mark: what it takes is known when it is called.

    Raises:
        UserError: a name that a default hook does not know.
    """
    for name in dir(type(trainer)):
        check = getattr(getattr(type(trainer), name), "check", None)
        if check is not None:
            check(args)


def check_name(flag: str, name: str, known: Sequence[str]) -> None:
    """Refuse a ``name`` that is not ``known``.

    Raises:
        UserError: names the flag, what is near, and everything that is known.
    """
    if name not in known:
        raise UserError(f"{flag}: unknown {name!r}{nearest(name, known)} (known: {', '.join(known)})")


def check_optimizer(args: Any) -> None:
    """Refuse an ``--opt`` that the default ``set_optimizer`` does not know or cannot use.

    Raises:
        UserError: see ``check_name``; Nesterov's momentum without momentum.
    """
    check_name("--opt", args.opt.lower(), OPTIMIZERS)
    if args.opt.lower() == "sgd_nesterov" and args.momentum <= 0:
        raise UserError(
            f"--opt sgd_nesterov needs a --momentum above 0, got {args.momentum}; without momentum take sgd"
        )


def check_schedule(args: Any) -> None:
    """Refuse a schedule or warm-up that the default ``set_lr_scheduler`` does not know or cannot use.

    Raises:
        UserError: see ``check_name``; a factor that makes the rate zero, negative or larger.
    """
    check_name("--lr-scheduler", args.lr_scheduler.lower(), SCHEDULERS)
    check_name("--lr-warmup-method", args.lr_warmup_method.lower(), WARMUPS)
    for flag, factor, used in (
        ("--lr-warmup-decay", args.lr_warmup_decay, args.lr_warmup_epochs > 0),
        ("--lr-gamma", args.lr_gamma, args.lr_scheduler.lower() != "cosa"),
    ):
        if used and not 0 < factor <= 1:
            raise UserError(
                f"{flag} must be above 0 and at most 1, got {factor}: the rate is multiplied by it"
            )
