"""From the command line to the two loaders of a run."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scalesnn.base import UserError
from scalesnn.data.arguments import default_workers
from scalesnn.data.augment import Recipe
from scalesnn.data.frames import FramesLoader, frames_shape
from scalesnn.data.index import ImageIndex
from scalesnn.data.layout import find_layout, open_splits, remark_on_depth
from scalesnn.data.listing import BAD_LIST, is_frames, read_bad_list
from scalesnn.data.loader import Loader, LoaderSettings
from scalesnn.data.mixing import Mixer
from scalesnn.data.policies import stages_of

__all__ = ["SAMPLE", "Data", "open_data", "recipe_of"]

log = logging.getLogger("scalesnn.data")

LONG_RUN = 1_000_000  # training images over all epochs: from there on, measuring at the start pays
SAMPLE = Path(__file__).parent / "sample" / "fashion-mnist"


@dataclass
class Data:
    """What a run trains on.

    Attributes:
        train, val: the loaders.
        classes: class names; a label is a place in this list.
        notices: lines for the user, collected while opening.
        fingerprint: changes with the list of images or labels: two ranks, or a run and the one it continues,
            that differ here see different data.
        frames_shape: T, C, H, W where the data are event frames, in batches [n, T, C, H, W]; None for images.
    """

    train: Loader
    val: Loader
    classes: list[str]
    notices: list[str] = field(default_factory=list)
    fingerprint: str = ""
    frames_shape: tuple[int, int, int, int] | None = None

    def close(self) -> None:
        """End threads and processes."""
        self.train.close()
        self.val.close()


NAMES = {
    "loader": ("auto", "dali", "torchvision"),
    "interpolation": ("nearest", "bilinear", "bicubic"),
    "bad_images": ("skip", "stop"),
    "loader_tune": ("auto", "on", "off"),
}


def recipe_of(args: argparse.Namespace, batch_size: int) -> Recipe:
    """The recipe that the flags state, once all data flags are checked.

    Raises:
        UserError: a value that cannot be.
    """
    for flag, known in NAMES.items():
        if getattr(args, flag) not in known:
            raise UserError(
                f"--{flag.replace('_', '-')}: unknown {getattr(args, flag)!r} (known: {', '.join(known)})"
            )
    for flag in ("train_crop_size", "val_resize_size", "val_crop_size", "ra_reps"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {args.workers}")
    if not 0 <= args.random_erase <= 1:
        raise UserError(f"--random-erase is a probability, 0 to 1, got {args.random_erase}")
    if not 0 < args.train_crop_area <= 1:
        raise UserError(f"--train-crop-area is a share, above 0 and at most 1, got {args.train_crop_area}")
    for flag in ("mixup_alpha", "cutmix_alpha"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} must be 0 or more, got {getattr(args, flag)}")
    policy = args.auto_augment or "none"
    stages_of(policy)
    return Recipe(
        train_crop_size=args.train_crop_size,
        val_resize_size=args.val_resize_size,
        val_crop_size=args.val_crop_size,
        minimum_area=args.train_crop_area,
        interpolation=args.interpolation,
        policy=policy,
        erase=args.random_erase,
    )


def open_data(
    args: argparse.Namespace,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Data:
    """Open the data set that the flags of ``add_data_arguments`` name.

    Args:
        args: the parsed flags; ``output_dir``, where there is one, is the place of --cache-dataset.
        batch_size: images a rank and step.
        seed: of order and augmentation.
        rank, world_size: this process among all.
        device, dtype: of the batches.

    Raises:
        UserError: a flag, a folder or an image list that cannot be; before any image is decoded.
    """
    device = torch.device(device)
    recipe = recipe_of(args, batch_size)
    notices: list[str] = []
    root = Path(args.data_path) if args.data_path else SAMPLE
    if not args.data_path:
        notices.append(f"no --data-path: training on the images that ship with scalesnn ({SAMPLE.name})")
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    train_index, val_index = _indexes(args, root, notices)
    shape = frames_shape(train_index) if is_frames(train_index) else None
    if shape is None:
        loader_class: Callable[..., Loader] = _loader_class(args.loader, notices)
    else:
        loader_class = functools.partial(FramesLoader, shape=shape)
    mixer = None
    if args.mixup_alpha > 0 or args.cutmix_alpha > 0:
        mixer = Mixer(seed, len(train_index.classes), args.mixup_alpha, args.cutmix_alpha)

    def settings(train: bool) -> LoaderSettings:
        return LoaderSettings(
            recipe=recipe,
            train=train,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
            dtype=dtype,
            workers=default_workers() if args.workers is None else args.workers,
            skip_bad=args.bad_images == "skip",
            pin_memory=not args.disable_pinmemory,
        )

    train = loader_class(train_index, settings(True), mixer, args.ra_reps if args.ra_sampler else 1)
    val = loader_class(val_index, settings(False))
    notices += _tuned(args, train)
    dali = shape is None and loader_class.__name__ == "DaliLoader"
    notices += _remarks(args, shape, dali, len(train_index), batch_size, world_size)
    fingerprint = train_index.fingerprint() + val_index.fingerprint()
    return Data(train, val, train_index.classes, notices, fingerprint, shape)


def _indexes(args: argparse.Namespace, root: Path, notices: list[str]) -> tuple[ImageIndex, ImageIndex]:
    """The images to train and to validate on, without those that a list names as bad.

    Raises:
        UserError: see open_index; or a list of bad images that cannot be read, must not be or leaves nothing.
    """
    cache = Path(getattr(args, "output_dir", None) or ".") / "data-index" if args.cache_dataset else None
    layout = find_layout(root)
    notices += layout.notices
    train, val = open_splits(layout, cache)
    notices += dict.fromkeys([*remark_on_depth(train), *train.left_out, *val.left_out])
    listed = Path(args.bad_image_list) if args.bad_image_list else root / BAD_LIST
    if not args.bad_image_list and not listed.is_file():
        return train, val
    bad = read_bad_list(listed, root)
    known = len(train) + len(val)
    train, val = train.without(bad), val.without(bad)
    left_out = known - len(train) - len(val)
    if left_out and args.bad_images == "stop":
        raise UserError(f"{listed} names {left_out} bad images (--bad-images skip goes on without them)")
    if not len(train) or not len(val):
        raise UserError(f"{listed} leaves no image to train or to validate on")
    if left_out:
        notices.append(f"{left_out} images are left out, as {listed} says")
    return train, val


def _remarks(
    args: argparse.Namespace,
    shape: tuple[int, ...] | None,
    dali: bool,
    images: int,
    batch_size: int,
    world_size: int,
) -> list[str]:
    """What a user should know about flags that meet unusual data or each other."""
    found = []
    if shape is not None:
        found.append(
            f"event frames [T, C, H, W] = {list(shape)}: used as they are, without resizing, flips and "
            "--auto-augment"
        )
    elif dali:
        if args.auto_augment != "none" and args.interpolation == "bicubic":
            found.append("--interpolation bicubic: the policy's shears and rotations stay bilinear with DALI")
        if args.disable_pinmemory:
            found.append("--disable-pinmemory does not concern the DALI loader")
    if batch_size % 2 and world_size > 1 and (args.mixup_alpha > 0 or args.cutmix_alpha > 0):
        found.append(
            f"an odd batch size ({batch_size}) on {world_size} ranks: the partners of mixup and cutmix "
            "depend on the number of ranks"
        )
    if images < batch_size * world_size:
        found.append(
            f"{images} training images are fewer than a global batch of {batch_size * world_size}: "
            "images repeat inside a batch"
        )
    return found


def _tuned(args: argparse.Namespace, loader: Loader) -> list[str]:
    """Measure and set the DALI loader's threads, where --loader-tune says so.

    Raises:
        UserError: tuning asked for of another loader.
    """
    images = loader.number_of_images * int(getattr(args, "epochs", None) or 1)
    if args.loader_tune == "off" or (args.loader_tune == "auto" and images < LONG_RUN):
        return []
    from scalesnn.data.dali_loader import DaliLoader
    from scalesnn.data.tuning import tune

    if isinstance(loader, DaliLoader):
        return [tune(loader)]
    if args.loader_tune == "on":
        raise UserError("--loader-tune on: only --loader dali on images can be tuned")
    return []


def _loader_class(name: str, notices: list[str]) -> type[Loader]:
    """The class behind --loader; ``auto`` takes torchvision's where DALI is missing, and says so.

    Raises:
        UserError: it cannot be used here.
    """
    if name != "torchvision":
        from scalesnn.data.dali_loader import DaliLoader, dali_problem

        problem = dali_problem()
        if problem is None:
            return DaliLoader
        install = "pip install nvidia-dali-cuda130"
        if name == "dali":
            raise UserError(f"--loader dali: {problem}; {install}, or take --loader torchvision")
        notices.append(f"images are decoded by torchvision: {problem}; DALI takes half the time: {install}")
    from scalesnn.data.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader
