"""A trained net from a run, a checkpoint or a file of weights: the same words mean the same everywhere.

A run's checkpoint, and what ``scalesnn export`` writes, say which net it is. Of another file the user does,
by --model and the flags beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scalesnn.base import UserError
from scalesnn.model.train_imagenet_example import SResNetTrainer, build_model
from scalesnn.model.weights import Weights, fit_weights
from scalesnn.training.arguments import check_arguments
from scalesnn.training.export import read_weights
from scalesnn.training.init_from import locate, open_weights
from scalesnn.training.resuming import settle

__all__ = ["Trained", "build_trained", "check_images_fit", "open_trained", "read_source", "take_settings"]


@dataclass
class Trained:
    """A net ready for use.

    Attributes:
        net: in evaluation mode and step mode 'm', on the CPU.
        args: its settings, as of a training.
        classes: the classes' names; their numbers where the names are not known.
        source: what the weights are from.
    """

    net: nn.Module
    args: Any
    classes: list[str]
    source: str


def read_source(source: str, *, ema: bool = False) -> Weights:
    """The weights that a user means, with what they say of themselves.

    Args:
        source: RUN or FILE, see ``network_arguments.SOURCE``.
        ema: the averaged ones instead.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    try:
        place: Path | str = locate(source) or source
        weights = open_weights(place)
    except UserError as error:
        raise UserError(str(error).removeprefix("--init-from ")) from None
    if ema:
        if not (isinstance(place, Path) and place.is_dir()):
            raise UserError(f"--ema: {source} is not a run or a checkpoint, so it holds one set of weights")
        weights.tensors = read_weights(place, ema=True)
    return weights


def take_settings(args: Any, weights: Weights) -> None:
    """Give ``args`` the settings that the weights were trained with, where no flag was given.

    Raises:
        UserError: nothing says which net it is.
    """
    if not weights.settings and "model" not in args.explicit:
        raise UserError(f"{weights.source} does not say which net it is: give --model (and --neuron, --T …)")
    settle(args, weights.settings, engine=False)
    args.pretrained, args.cupy, args.init_from, args.resume = False, False, None, None


def build_trained(args: Any, weights: Weights, num_classes: int) -> nn.Module:
    """The net that ``args`` names, with these weights.

    Raises:
        UserError: they do not fit: other classes or channels included.
    """
    net = build_model(args, num_classes)
    fit = fit_weights(net, weights)
    if fit.anew or fit.kept:
        raise UserError(f"{weights.source} does not fit {args.model}: {'; '.join([*fit.ends, *fit.neurons])}")
    return net


def open_trained(source: str, words: Sequence[str] = (), *, ema: bool = False) -> Trained:
    """Build the net that ``source`` names, with its weights.

    Args:
        words: flags of a training that override what the source says.

    Raises:
        UserError: no such source, it does not say which net it is, or its weights do not fit.
    """
    weights = read_source(source, ema=ema)
    args = SResNetTrainer().get_args_parser().parse_args(list(words))
    take_settings(args, weights)
    check_arguments(args)
    head, stem = (
        next((w for key, w in weights.tensors.items() if key.startswith(name) and w.dim() == dim), None)
        for name, dim in (("fc.", 2), ("conv1.", 4))
    )
    count = len(weights.classes) if head is None else len(head)
    args.in_channels = args.in_channels or (3 if stem is None else stem.shape[1])
    net = build_trained(args, weights, count)
    names = weights.classes if len(weights.classes) == count else [str(k) for k in range(count)]
    return Trained(net.eval().requires_grad_(False), args, names, weights.source)


def check_images_fit(trained: Trained) -> None:
    """Refuse a net for other inputs than images of three channels.

    Raises:
        UserError: it is for event frames, say.
    """
    if trained.args.in_channels != 3:
        raise UserError(f"{trained.source} takes {trained.args.in_channels} channels: an image has 3")
