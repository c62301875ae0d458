"""The command line: one parser for flags and recipes.

A recipe (``--config RECIPE.yaml``) sets the default of any flag; a flag on the command line wins, wherever it
stands. A recipe is turned into words of a command line, and jsonargparse parses those. What is ours is the
wording of errors, and ``args.explicit``: the names of the settings that the user gave, by flag or by recipe,
as against those left at their defaults.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse
import torch

from scalesnn.base import UserError, speak_utf8
from scalesnn.configs import find_config
from scalesnn.parallel.devices import unusable_gpu
from scalesnn.tracking.reference import load_reference
from scalesnn.training.fine_tuning import check_fine_tuning
from scalesnn.training.recipes import read_recipe, words_of

__all__ = [
    "RecipeParser",
    "add_model_arguments",
    "add_optimization_arguments",
    "add_run_arguments",
    "check_arguments",
    "check_weights",
]

OPTIMIZERS = ("sgd", "sgd_nesterov", "rmsprop", "adamw")
PATHS = ("DIR", "FILE", "JSON", "PATH", "RECIPE", "YAML")  # metavars of flags that take a path
SCHEDULERS = ("step", "cosa", "exp")
WARMUPS = ("linear", "constant")


class RecipeParser(jsonargparse.ArgumentParser):
    """An argparse parser whose ``--config`` reads recipes and whose errors are one line with exit code 2.

    Use ``add_argument`` as with argparse. ``parse_args`` returns a namespace that also holds ``explicit``,
    the set of destinations that were set by a flag or by the recipe.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--config",
            action="config",
            metavar="RECIPE",
            help="recipe, a file or a shipped one such as sample: sets any flag's default",
        )

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse the command line; the recipe goes first, so that a flag always wins.

        Args:
            args: the words of the command line, ``sys.argv[1:]`` when None.

        Raises:
            SystemExit: with code 2 and one line on standard error, for any unknown or malformed setting.
        """
        speak_utf8()
        words = list(sys.argv[1:] if args is None else args)
        recipes, words = split_recipes(words)
        given = self._given(words)
        for action in self._actions:
            times = [w for w in (word.split("=", 1)[0] for word in words) if w in action.option_strings]
            if action.nargs in ("*", "+") and len(times) > 1:  # argparse would keep the last one only
                self.error(f"{times[0]} is given twice: give all its values after one")
        settings: dict[str, list[str]] = {}
        try:
            for recipe in recipes:
                settings |= self._of_recipe(str(find_config("--config", recipe, "recipes/*.yaml")))
        except UserError as error:
            self.error(str(error))
        of_recipes = [word for setting in settings.values() for word in setting]
        namespace = super().parse_args([*of_recipes, *words], *rest, **kwargs)
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if value == [] and action.nargs is None:  # argparse takes `--flag=--` for the end of the flags
                self.error(f"{action.option_strings[-1]}: '--' is not a value")
            if action.metavar in PATHS and isinstance(value, str) and value.startswith("~"):
                setattr(namespace, action.dest, os.path.expanduser(value))  # no shell has done it
        namespace.config = recipes or None
        namespace.explicit = given | set(settings)
        return namespace

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        """Print what is wrong in one line and exit with code 2."""
        print(f"{self.prog}: {self._plain(message)}", file=sys.stderr)
        raise SystemExit(2)

    def _given(self, words: list[str]) -> set[str]:
        names = {word.split("=", 1)[0] for word in words if word.startswith("-")}
        return {a.dest for a in self._actions if names & set(a.option_strings)} | {
            a.dest
            for a in self._actions
            for option in a.option_strings
            if len(option) == 2 and any(w.startswith(option) and not w.startswith("--") for w in words)
        }

    def _of_recipe(self, path: str) -> dict[str, list[str]]:
        """By destination, the words that a recipe stands for.

        Raises:
            UserError: the recipe cannot be read, or has a setting or a value that no flag takes.
        """
        apart = ("help", "config", "print_config")
        known = {a.dest: a for a in self._actions if a.option_strings and a.dest not in apart}
        words = {}
        for key, value in read_recipe(path).items():
            if key not in known:
                options = [o.lstrip("-").replace("-", "_") for a in known.values() for o in a.option_strings]
                hint = nearest(str(key).replace("-", "_"), [*known, *options])
                raise UserError(f"--config {path}: unknown setting {key!r}{hint}")
            if value is not None:
                words[key] = words_of(known[key], value)
        return words

    def _plain(self, message: str) -> str:
        """Turn jsonargparse's wording into ours."""
        text = " ".join(str(message).split())
        if found := re.search(r"Parser key \"?([\w.]+)\"?: (.*)", text):
            flag = next((a.option_strings[-1] for a in self._actions if a.dest == found[1]), found[1])
            detail = found[2]
            if typed := re.search(r"Expected an? <class '(\w+)'>\. Got value: (.*)", detail):
                kind = {"int": "a whole number", "float": "a number"}.get(typed[1], typed[1])
                detail = f"expected {kind}, got {typed[2]!r}"
            return f"{flag}: {detail}"
        if found := re.search(r"[Uu]nrecognized arguments: (\S+)", text):
            options = [o for a in self._actions for o in a.option_strings]
            return f"unknown flag {found[1]!r}{nearest(found[1].split('=')[0], options)}"
        return text


def split_recipes(words: list[str]) -> tuple[list[str], list[str]]:
    """Take ``--config X`` and ``--config=X`` out of a command line: (the recipes, the other words)."""
    recipes, others, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            recipes.append(words.pop(0))
        elif word.startswith("--config="):
            recipes.append(word.split("=", 1)[1])
        else:
            others.append(word)
    return recipes, others


def nearest(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'batch_size'?"`` where something known is near, else an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def add_model_arguments(parser: RecipeParser) -> None:
    """Flags that choose the network."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="spiking_resnet18", metavar="NAME", help="name of the network")
    group.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    group.add_argument(
        "--init-from",
        default=None,
        metavar="FILE|RUN|NAME",
        help="start from the weights of a file, a run or checkpoint, or torchvision's of that name",
    )
    group.add_argument(
        "--weights",
        default=None,
        metavar="NAME",
        help="torchvision weights, e.g. ResNet18_Weights.IMAGENET1K_V1: evaluate with their preprocessing",
    )
    group.add_argument(
        "--prototype",
        action="store_true",
        help="no effect: torchvision's prototype models are its ordinary ones now; --weights works alone",
    )


def add_optimization_arguments(parser: RecipeParser) -> None:
    """Flags of the optimizer, the schedule and the averaged model."""
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "-b", "--batch-size", default=32, type=int, metavar="N", help="images per device and step"
    )
    group.add_argument("--epochs", default=90, type=int, metavar="N", help="number of epochs to train")
    group.add_argument("--opt", default="sgd", metavar="NAME", help=", ".join(OPTIMIZERS))
    group.add_argument("--lr", default=0.1, type=float, help="initial learning rate")
    group.add_argument(
        "--lr-scale",
        default=[],
        nargs="+",
        metavar="PATTERN=F",
        help="rate of the parameters whose names match, such as 'layer1.*=0.1': --lr times F",
    )
    group.add_argument(
        "--freeze",
        default=[],
        nargs="+",
        metavar="PATTERN",
        help="parameters that keep their values, such as 'conv1.*' 'layer?.*'; BatchNorms keep statistics",
    )
    group.add_argument("--momentum", default=0.9, type=float, metavar="M", help="of sgd and rmsprop")
    group.add_argument(
        "--wd",
        "--weight-decay",
        default=0.0,
        type=float,
        metavar="W",
        dest="weight_decay",
        help="weight decay",
    )
    group.add_argument(
        "--norm-weight-decay",
        default=None,
        type=float,
        metavar="W",
        help="of normalisation layers (default: --wd)",
    )
    group.add_argument("--label-smoothing", default=0.1, type=float, help="of the cross-entropy")
    group.add_argument("--lr-scheduler", default="cosa", metavar="NAME", help=", ".join(SCHEDULERS))
    group.add_argument("--lr-warmup-epochs", default=5, type=int, metavar="N", help="epochs of warm-up")
    group.add_argument("--lr-warmup-method", default="linear", metavar="NAME", help=", ".join(WARMUPS))
    group.add_argument("--lr-warmup-decay", default=0.01, type=float, help="factor of the rate at the start")
    group.add_argument(
        "--lr-step-size", default=30, type=int, metavar="N", help="epochs between steps of 'step'"
    )
    group.add_argument("--lr-gamma", default=0.1, type=float, help="factor of 'step' and 'exp'")
    group.add_argument("--model-ema", action="store_true", help="also keep and test averaged weights")
    group.add_argument("--model-ema-steps", default=32, type=int, metavar="N", help="steps between updates")
    group.add_argument("--model-ema-decay", default=0.99998, type=float, help="decay of the average")


def add_run_arguments(parser: RecipeParser) -> None:
    """Flags of the run itself: where, how long, from where, with what numbers."""
    group = parser.add_argument_group("run")
    group.add_argument("--device", default="auto", help="auto (a GPU where there is one), cuda or cpu")
    group.add_argument("--seed", default=2020, type=int, help="of weights, order and augmentation")
    group.add_argument("--output-dir", default="./runs", metavar="DIR", help="runs are written below it")
    group.add_argument(
        "--run-name", default=None, metavar="NAME", help="folder of the run (default: from settings)"
    )
    group.add_argument("--print-logdir", action="store_true", help="print the run's folders and exit")
    group.add_argument("--clean", action="store_true", help="delete the earlier runs of this name first")
    group.add_argument(
        "--resume", default=None, metavar="PATH", help="latest, best, or the path of a run or a checkpoint"
    )
    group.add_argument(
        "--reference",
        default=None,
        metavar="NAME|FILE",
        help="published run to compare with, such as sew_resnet34: its rate, its curve in the report",
    )
    group.add_argument("--start-epoch", default=0, type=int, metavar="N", help="number of the first epoch")
    group.add_argument(
        "--max-steps", default=None, type=int, metavar="N", help="stop there, save and evaluate"
    )
    group.add_argument("--save-every", default=None, type=int, metavar="N", help="steps between checkpoints")
    group.add_argument(
        "--keep-checkpoints", default=2, type=int, metavar="N", help="newest kept, besides the best"
    )
    group.add_argument(
        "--background-checkpoints", action="store_true", help="write checkpoints while training goes on"
    )
    group.add_argument("--test-only", action="store_true", help="only evaluate")
    group.add_argument("--disable-amp", action="store_true", help="no bf16 autocast on a GPU")
    group.add_argument(
        "--tf32", action="store_true", help="float32 products in TF32 on a GPU (factors of 10 bits, faster)"
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network's training steps (without recomputation)",
    )
    group.add_argument(
        "--cuda-graph",
        action="store_true",
        help="record the training step as a CUDA graph after 3 steps: no launches from the host (one GPU)",
    )
    group.add_argument(
        "--disable-uda",
        action="store_true",
        help="do not insist on deterministic algorithms (faster on a GPU)",
    )


def check_arguments(args: Any) -> None:
    """Refuse settings that cannot work, before anything is loaded; names that hooks extend are theirs to
    check.

    Raises:
        UserError: one line that names the flag, what was given and what is possible.
    """
    for flag, value in vars(args).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{option(flag)} must fit 64 bits, got {value}")
    for flag, least in {
        "seed": 0,
        "batch_size": 1,
        "epochs": 1,
        "T": 1,
        "max_steps": 1,
        "save_every": 1,
        "keep_checkpoints": 1,
        "model_ema_steps": 1,
        "lr_step_size": 1,
        "lr_warmup_epochs": 0,
        "start_epoch": 0,
        "metrics_every": 1,
        "spike_metrics_every": 0,
        "profile": 0,
    }.items():
        value = getattr(args, flag, None)
        if isinstance(value, int) and value < least:
            raise UserError(f"{option(flag)} must be at least {least}, got {value}")
    for flag in ("lr", "weight_decay", "momentum", "norm_weight_decay"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{option(flag)} must be 0 or more, got {value}")
    for flag in ("label_smoothing", "model_ema_decay"):
        if not 0 <= getattr(args, flag) <= 1:
            raise UserError(f"{option(flag)} must lie between 0 and 1, got {getattr(args, flag)}")
    if args.device not in ("auto", "cpu") and not args.device.startswith("cuda"):
        raise UserError(f"--device: expected auto, cuda or cpu, got {args.device!r}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        problem = unusable_gpu() or "torch sees no GPU here"
        raise UserError(f"--device {args.device}: {problem}; leave the flag out or give --device cpu")
    check_fine_tuning(args)
    if args.reference is not None:
        load_reference(args.reference)
    if args.pretrained and args.init_from is not None:
        raise UserError(
            f"--pretrained and --init-from {args.init_from} both name weights: leave one of them out"
        )
    if args.start_epoch >= args.epochs:
        raise UserError(
            f"--start-epoch {args.start_epoch} leaves no epoch to train: with --epochs {args.epochs} "
            f"the last one is {args.epochs - 1}"
        )


def check_weights(args: Any) -> None:
    """--weights: resize, crop and interpolate test images as those weights want it, where no flag says else.

    Raises:
        UserError: torchvision has no such weights.
    """
    if args.weights is None:
        return
    import torchvision  # late: it takes two seconds, and a start with DALI needs none of it

    try:
        preset = torchvision.models.get_weight(args.weights).transforms()
    except (ValueError, KeyError, AttributeError):
        raise UserError(
            f"--weights: torchvision has no {args.weights!r}; expected something like "
            "ResNet18_Weights.IMAGENET1K_V1"
        ) from None
    wanted = {
        "val_resize_size": preset.resize_size[0],
        "val_crop_size": preset.crop_size[0],
        "interpolation": preset.interpolation.value,
    }
    for destination, value in wanted.items():
        if destination not in args.explicit:
            setattr(args, destination, value)


def option(destination: str) -> str:
    """``batch_size`` → ``--batch-size``."""
    return "--T" if destination == "T" else "--" + destination.replace("_", "-")
