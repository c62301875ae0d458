"""A run that goes on under another command line: which settings hold.

A flag that is given wins; a flag that is not given stays as the run had it. One line of the log names every
setting that differs, the value that holds, and why. What the strategy then restores from the checkpoint, and
what not, follows from the settings that changed (see ``strategy_state.RENEWED``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalesnn.parallel.strategy_state import RENEWED
from scalesnn.training.checkpoint import find_checkpoints, newest_first
from scalesnn.training.checkpoint_index import DamagedCheckpointError, Index
from scalesnn.training.run_name import run_settings

__all__ = ["Resumption", "saved_settings", "settle"]

# Settings that DeepSpeed's configuration is made of before the checkpoint is known.
OF_THE_ENGINE = frozenset({"batch_size", "gradient_accumulation", "global_batch", "clip_grad_norm"})


@dataclass(frozen=True)
class Resumption:
    """What came of the settings of a resumed run.

    Attributes:
        settings: those that hold, as they are before the data is known; checkpoints keep them.
        changed: names of those that hold now and are not the checkpoint's.
        text: one line for the user; empty if nothing differs.
    """

    settings: dict[str, Any]
    changed: frozenset[str]
    text: str


def saved_settings(folder: Path, which: str) -> dict[str, Any]:
    """The settings under which a checkpoint was written; empty if they cannot be read (``load`` says why).

    Args:
        folder: of the run.
        which: ``latest``, ``best`` or a path, as for --resume.
    """
    latest = which in ("latest", "best")
    for checkpoint in newest_first(folder / "checkpoints") if latest else find_checkpoints(Path(which)):
        try:
            plain = Index.read(checkpoint).plain
        except DamagedCheckpointError:
            continue
        return dict(plain["extra"].get("settings") or of_groups(plain.get("train") or {}))
    return {}


def of_groups(train: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint without settings (written before they were kept) says of its optimizer."""
    options = [group["options"] for group in train.get("groups", [])]
    if not options:
        return {}
    found = {"lr": options[-1].get("initial_lr"), "weight_decay": options[-1].get("weight_decay")}
    found["momentum"] = options[-1].get("momentum")
    if len(options) == 2:
        found["norm_weight_decay"] = options[0].get("weight_decay")
    return {name: value for name, value in found.items() if value is not None}


def settle(args: Any, saved: dict[str, Any], *, engine: bool) -> Resumption:
    """Give ``args`` the run's settings where no flag was given, and say what differs.

    Args:
        args: the command line; ``args.explicit`` names the settings that were given.
        saved: of the checkpoint.
        engine: a DeepSpeed engine has taken its settings already.
    """
    here = run_settings(args)
    given: set[str] = getattr(args, "explicit", set())
    taken, kept, changed = [], [], set()
    for name in (name for name in here if name in saved and here[name] != saved[name]):
        fixed = here[name] != getattr(args, name, None) and name != "data_path"  # an object: not to be stored
        if name in given or fixed or (engine and name in OF_THE_ENGINE):
            changed.add(name)
            why = "" if name in given else ", not given, but read before the checkpoint"
            taken.append(f"{name} {here[name]} instead of {saved[name]}{why}")
        else:
            setattr(args, name, saved[name])
            kept.append(f"{name} {saved[name]}")
    parts = []
    if taken:
        parts.append("taken from this command line: " + ", ".join(taken))
    if kept:
        parts.append("kept as the run had them, since they are not given: " + ", ".join(kept))
    if changed & RENEWED["schedule"]:
        parts.append(
            f"the schedule is made anew for {args.epochs} epochs and goes on at the checkpoint's epoch"
        )
    return Resumption(run_settings(args), frozenset(changed), "; ".join(parts))
