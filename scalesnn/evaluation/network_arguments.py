"""The flags by which a command takes a trained net: RUN|FILE, and what the net of a bare file is."""

from __future__ import annotations

import argparse

from scalesnn.training.arguments import option

__all__ = ["SOURCE", "add_network_arguments", "network_words"]

SOURCE = "a run's folder (its newest checkpoint), a checkpoint, RUN/checkpoints/best, or a file of weights"
NETWORK = {
    "model": "name of the network",
    "neuron": "IF, LIF or PLIF",
    "tau": "time constant",
    "surrogate": "class of scalesnn.surrogate",
    "cnf": "SEW-ResNet: ADD, AND or IAND",
    "stem_pool": "pooling after the first neuron: max or avg",
    "T": "time-steps",
    "val_resize_size": "shorter side to which an image is resized",
    "val_crop_size": "side of the crop that the net sees",
}


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --ema, and the flags that say what the net of a bare file of weights is."""
    parser.add_argument("--ema", action="store_true", help="the averaged weights (of a run with --model-ema)")
    group = parser.add_argument_group("the net (default: as RUN or FILE says)")
    for name, what in NETWORK.items():
        group.add_argument(option(name), metavar="X", help=what)


def network_words(args: argparse.Namespace) -> list[str]:
    """The flags of ``add_network_arguments`` that were given, as words of a training's command line."""
    return [f"{option(name)}={getattr(args, name)}" for name in NETWORK if getattr(args, name) is not None]
