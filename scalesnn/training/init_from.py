"""``--init-from FILE|RUN|NAME``: weights and buffers to begin with, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from scalesnn.base import UserError
from scalesnn.model.published import recognise
from scalesnn.model.weights import (
    Weights,
    fit_weights,
    read_weights_file,
    torchvision_weights,
    without_prefixes,
)
from scalesnn.parallel.strategy import Strategy
from scalesnn.training.checkpoint import checkpoint_folders, find_checkpoints
from scalesnn.training.checkpoint_index import Index
from scalesnn.training.export import read_weights

__all__ = ["initialise", "locate", "open_weights"]

FLAG = "--init-from"
OF_THE_NET = ("model", "T", "neuron", "surrogate", "cnf", "stem_pool")
POINTERS = ("latest", "best", "index.json")


def initialise(args: Any, model: nn.Module, classes: list[str], strategy: Strategy) -> list[str]:
    """Load what ``--init-from`` names into a network that no strategy has taken over yet.

    A run that is resumed has its weights from the checkpoint: then nothing is read.

    Args:
        classes: names of the data's classes.

    Returns:
        lines for the user.

    Raises:
        UserError: there is no such file, run or name, or it does not fit.
    """
    if args.init_from is None:
        return []
    if args.resume is not None:
        if "init_from" not in getattr(args, "explicit", ()):
            return []
        return [f"{FLAG} {args.init_from} is not read: the weights are those of the checkpoint of --resume"]
    problem, path = None, None
    if strategy.is_main:  # of a run that still trains, all ranks take the same checkpoint
        try:
            path = locate(args.init_from, args.output_dir)
        except UserError as error:
            problem = str(error)
    problem, path = strategy.broadcast((problem, path))
    if problem is not None:
        raise UserError(problem)
    hint = ""
    try:
        weights = open_weights(path or args.init_from)
        if recognise(map(without_prefixes, weights.tensors)) in ("sew", "ms", "psn"):
            hint = f" (its keys are those of published weights: see scalesnn import {args.init_from})"
        fit = fit_weights(model, weights)
    except UserError as error:
        raise UserError(f"{FLAG} {error}{hint}") from None
    if fit.anew and args.test_only:
        raise UserError(f"--test-only {FLAG} {args.init_from}: {'; '.join(fit.ends)}: train it first")
    notices = [*weights.notices, *fit.ends, *fit.neurons]
    same_size = not any("classifier" in end for end in fit.ends)
    if weights.classes and same_size and list(weights.classes) != list(classes):
        notices.append("its classes have other names or another order, and its classifier is taken as it is")
    if others := other_settings(args, weights.settings):
        notices.append(f"they were trained with {', '.join(others)}")
    told = "".join(f"; {notice}" for notice in notices)
    return [f"weights and buffers are from {weights.source}, by {FLAG}{told}"]


def other_settings(args: Any, trained: dict[str, Any]) -> list[str]:
    """In which settings of the network this run differs from the one that the weights are from."""
    found = []
    for name in OF_THE_NET:
        if name in trained and hasattr(args, name):
            there, here = (s or "IF" if name == "neuron" else s for s in (trained[name], getattr(args, name)))
            if there != here:
                found.append(f"{name} {there}, here {here}")
    return found


def locate(name: str, output_dir: str | Path | None = None) -> Path | None:
    """The file or checkpoint that a user means; None for torchvision's weights of that name.

    Args:
        name: a file of weights; a run's folder, a checkpoint or its pointer (``RUN/checkpoints/best``); a
            run's name below ``output_dir``; or torchvision's name of weights.

    Raises:
        UserError: it is nothing of the kind.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.name not in POINTERS:
        return path
    if path.exists():
        return find_checkpoints(path)[0]
    if output_dir is not None and checkpoint_folders(Path(output_dir).expanduser() / name / "checkpoints"):
        return find_checkpoints(Path(output_dir).expanduser() / name)[0]
    if "Weights." in name and "/" not in name:
        return None
    where = "" if output_dir is None else f", no run of that name in {output_dir}"
    raise UserError(
        f"{FLAG} {name}: no such file or run{where}, and not a name of torchvision's weights such as "
        "ResNet18_Weights.IMAGENET1K_V1"
    )


def open_weights(place: Path | str) -> Weights:
    """Read what ``locate`` found: a file of weights, a checkpoint's folder, or torchvision's by their name.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    if isinstance(place, str):
        return torchvision_weights(place)
    if place.is_file():
        return read_weights_file(place)
    tensors = read_weights(place)
    plain = Index.read(place).plain
    classes = (plain.get("data") or {}).get("classes") or []
    settings = (plain.get("extra") or {}).get("settings") or {}
    return Weights(tensors, str(place), list(classes), dict(settings))
