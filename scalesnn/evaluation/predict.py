"""``scalesnn predict``: the five best classes of each image."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scalesnn import functional
from scalesnn.base import UserError
from scalesnn.data import recipe_of
from scalesnn.data.augment import Recipe
from scalesnn.data.headers import BadImageError, decode_rgb
from scalesnn.data.torchvision_loader import evaluation_transform
from scalesnn.evaluation.network_arguments import SOURCE, add_network_arguments, network_words
from scalesnn.evaluation.trained import Trained, check_images_fit, open_trained

__all__ = ["best_classes", "read_image", "run_words"]


def parser_of_command() -> argparse.ArgumentParser:
    """The parser of ``scalesnn predict``."""
    parser = argparse.ArgumentParser(
        prog="scalesnn predict", description="The five best classes of each image.", allow_abbrev=False
    )
    parser.add_argument("source", metavar="RUN|FILE", help=SOURCE)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files: JPEG, PNG, WebP, …")
    add_network_arguments(parser)
    return parser


def run_words(words: Sequence[str]) -> int:
    """Do what the words of the command line say; returns the exit code."""
    args = parser_of_command().parse_args(list(words))
    trained = open_trained(args.source, network_words(args), ema=args.ema)
    check_images_fit(trained)
    recipe = recipe_of(trained.args, 1)
    for name in args.images:
        best = best_classes(trained, read_image(Path(name).expanduser(), recipe))
        print(f"{name}: " + ", ".join(f"{label} {100 * share:.1f} %" for label, share in best), flush=True)
    return 0


def read_image(path: Path, recipe: Recipe) -> Tensor:
    """An image as the net saw the validation images: [3, H, W].

    Raises:
        UserError: it cannot be read.
    """
    try:
        return evaluation_transform(decode_rgb(path.read_bytes()), recipe)
    except BadImageError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


@torch.no_grad()
def best_classes(trained: Trained, image: Tensor, count: int = 5) -> list[tuple[str, float]]:
    """The classes with the largest logits, and their softmax, best first."""
    functional.reset_net(trained.net)
    logits_TNK = trained.net(functional.repeat_over_time(image[None], trained.args.T))
    shares, labels = logits_TNK.mean(0)[0].softmax(0).topk(min(count, len(trained.classes)))
    return [(trained.classes[k], share) for k, share in zip(labels.tolist(), shares.tolist(), strict=True)]
