"""The data flags of every trainer."""

from __future__ import annotations

import argparse
import os

__all__ = ["add_data_arguments", "default_workers"]


def default_workers() -> int:
    """min(8, the cores of this process, shared with the other ranks on this machine)."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(1, min(8, cores // max(1, ranks)))


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the data flags to ``parser``, in a group of their own."""
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-path",
        type=str,
        default=None,
        metavar="DIR",
        help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg; without it, the images of scalesnn itself",
    )
    add(
        "--loader",
        type=str,
        default="auto",
        metavar="NAME",
        help="what decodes and augments: dali (NVIDIA DALI), torchvision (with Pillow), or auto: DALI where "
        "it is installed",
    )
    add(
        "-j",
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="threads (DALI) or processes (torchvision) for data, a rank; default: min(8, cores per rank)",
    )
    add(
        "--cache-dataset",
        action="store_true",
        help="keep the list of images in OUTPUT_DIR/data-index; a changed class folder renews it",
    )
    add(
        "--auto-augment",
        type=str,
        default="ta_wide",
        metavar="POLICY",
        help="ta_wide, ra, imagenet, cifar10, svhn (AutoAugment), augmix, or none",
    )
    add("--random-erase", type=float, default=0.1, metavar="P", help="probability of random erasing")
    add("--mixup-alpha", type=float, default=0.2, metavar="A", help="mixup's Beta(A, A); 0 switches it off")
    add("--cutmix-alpha", type=float, default=1.0, metavar="A", help="CutMix's Beta(A, A); 0 switches it off")
    add(
        "--interpolation",
        type=str,
        default="bilinear",
        metavar="NAME",
        help="how images are resized: nearest, bilinear or bicubic",
    )
    add("--train-crop-size", type=int, default=176, metavar="PIXELS", help="size of a training image")
    add(
        "--train-crop-area",
        type=float,
        default=0.08,
        metavar="SHARE",
        help="smallest share of an image's area that a random crop takes",
    )
    add(
        "--val-resize-size",
        type=int,
        default=232,
        metavar="PIXELS",
        help="shorter side of a validation image before its centre is cut out",
    )
    add("--val-crop-size", type=int, default=224, metavar="PIXELS", help="size of a validation image")
    add(
        "--ra-sampler",
        action="store_true",
        help="repeated augmentation: copies of an image, augmented differently, in the same global batch",
    )
    add("--ra-reps", type=int, default=4, metavar="N", help="copies of an image with --ra-sampler")
    add(
        "--bad-images",
        type=str,
        default="skip",
        metavar="skip|stop",
        help="an unreadable image is replaced (in validation left out) and named; or it stops the run",
    )
    add(
        "--bad-image-list",
        type=str,
        default=None,
        metavar="FILE",
        help="images to leave out, from `scalesnn data check`; default: DATA_PATH/bad-images.txt, if there",
    )
    add(
        "--loader-tune",
        type=str,
        default="auto",
        metavar="auto|on|off",
        help="measure at the start how many DALI threads pay (up to --workers); auto: on long runs only",
    )
    add(
        "--disable-pinmemory",
        action="store_true",
        help="no page-locked host memory in the torchvision loader, which uses less memory",
    )
