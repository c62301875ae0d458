"""DALI against torchvision: the same geometry, nearly the same pixels, the same distributions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as F

from scalesnn.data.augment import Recipe, centre_crop, draw_train, resized_size
from scalesnn.data.mixing import _beta, draw_mix
from scalesnn.data.policies import OPERATIONS, POLICIES, draw_policy, numbers_needed
from scalesnn.data.sampling import BatchKeys, Purpose, TrainOrder, uniforms

PIXEL = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> Path:
    """60 training and 24 validation JPEGs of photo size, with odd and even sides."""
    root = tmp_path_factory.mktemp("photos")
    sizes = np.random.default_rng(3).integers(150, 420, (84, 2))
    for number, (height, width) in enumerate(sizes.tolist()):
        folder = root / ("train" if number < 60 else "val") / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, height, width)).save(folder / f"{number:02d}.jpg", quality=92)
    return root


def both_loaders(open_loaders: Any, root: Path, *flags: str) -> tuple[Any, Any]:
    size = ("--train-crop-size", "128", "--val-resize-size", "150", "--val-crop-size", "128")
    plain = ("--mixup-alpha", "0", "--cutmix-alpha", "0", *size, *flags)
    dali = open_loaders(root, "--loader", "dali", *plain, batch_size=12)
    return dali, open_loaders(root, "--loader", "torchvision", *plain, "-j", "0", batch_size=12)


def stacked(loader: Any) -> Tensor:
    return torch.cat([images for images, _ in loader.epoch(0)])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_validation_pixels_are_those_of_torchvisions_own_transforms(
    interpolation: str, photos: Path, open_loaders: Any
) -> None:
    dali, _ = both_loaders(open_loaders, photos, "--interpolation", interpolation)
    transform = transforms.Compose(
        [
            transforms.Resize(150, InterpolationMode(interpolation)),
            transforms.CenterCrop(128),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted((photos / "val").glob("*/*.jpg"))
    expected = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    assert ((stacked(dali.val) - expected).abs() * PIXEL).mean() <= 0.2


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_training_pixels_of_both_loaders_agree_without_a_policy(
    interpolation: str, photos: Path, open_loaders: Any
) -> None:
    dali, reference = both_loaders(
        open_loaders,
        photos,
        "--auto-augment",
        "none",
        "--random-erase",
        "0.5",
        "--interpolation",
        interpolation,
    )
    assert ((stacked(dali.train) - stacked(reference.train)).abs() * PIXEL).mean() <= 0.2


@pytest.mark.parametrize("policy", POLICIES)
def test_training_pixels_of_both_loaders_agree_with_a_policy(
    policy: str, photos: Path, open_loaders: Any
) -> None:
    dali, reference = both_loaders(open_loaders, photos, "--auto-augment", policy, "--random-erase", "0")
    difference = ((stacked(dali.train) - stacked(reference.train)).abs() * PIXEL).mean(dim=(1, 2, 3))
    assert difference.median() <= 0.8
    assert difference.mean() <= 2.5  # a chain may end with an operation that magnifies small differences


def test_resized_sizes_and_crop_corners_are_torchvisions() -> None:
    sizes = np.random.default_rng(0).integers(20, 700, (300, 2))
    resized = resized_size(sizes, 232)
    corners = centre_crop(resized, 224)
    for (height, width), (new_height, new_width), (top, left) in zip(sizes, resized, corners, strict=True):
        blank = Image.new("L", (int(width), int(height)))
        assert F.resize(blank, [232]).size == (new_width, new_height)
        marked = Image.fromarray(
            np.arange(new_height * new_width, dtype=np.int32).reshape(new_height, new_width)
        )
        assert F.center_crop(marked, [224]).getpixel((0, 0)) == top * new_width + left


def test_an_image_smaller_than_the_crop_is_padded_like_torchvision(
    tmp_path: Path, picture: Any, open_loaders: Any
) -> None:
    for split in ("train", "val"):
        for number, size in enumerate([(9, 30), (31, 9), (11, 11)]):
            folder = tmp_path / split / f"class_{number}"
            folder.mkdir(parents=True)
            Image.fromarray(picture(number, *size)).save(folder / "image.png")
    size = ("--val-resize-size", "9", "--val-crop-size", "14")
    dali = open_loaders(tmp_path, *size)
    reference = open_loaders(tmp_path, *size, "--loader", "torchvision", "-j", "0")
    assert ((stacked(dali.val) - stacked(reference.val)).abs() * PIXEL).max() <= 1.01


# -- distributions: our draws against torchvision's own random transforms


def our_draws(recipe: Recipe, count: int, height: int, width: int) -> Any:
    keys = BatchKeys(np.arange(count), *(np.zeros(count, np.int64) for _ in range(3)))
    return draw_train(recipe, 11, 0, keys, np.tile([height, width], (count, 1)))


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov, one in a thousand."""
    grid = np.sort(np.concatenate((ours, theirs)))
    first = np.searchsorted(np.sort(ours), grid, side="right") / len(ours)
    second = np.searchsorted(np.sort(theirs), grid, side="right") / len(theirs)
    assert np.abs(first - second).max() < 1.95 * np.sqrt(
        (len(ours) + len(theirs)) / (len(ours) * len(theirs))
    )


@pytest.mark.parametrize("shape", [(375, 500), (80, 900), (900, 80), (28, 28)])
def test_crop_windows_have_torchvisions_distribution(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    blank = Image.new("L", shape[::-1])
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)], np.float64)
    ours = our_draws(Recipe(), 4000, *shape).crop
    for column in range(4):
        same_distribution(ours[:, column], theirs[:, column])
    same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])


def test_erased_rectangles_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    image = torch.ones(1, 60, 60)
    rectangles = [
        transforms.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)
    ]
    theirs = np.array(rectangles, np.float64)
    ours = our_draws(Recipe(train_crop_size=60, erase=0.25), 16000, 90, 90).erase
    chosen = ours[ours[:, 2] > 0]
    assert abs(len(chosen) / 16000 - 0.25) < 0.015
    for column in range(4):
        same_distribution(chosen[:, column], theirs[:, column])


def test_half_of_the_images_are_flipped() -> None:
    assert abs(our_draws(Recipe(), 10000, 50, 50).flip.mean() - 0.5) < 0.02


class Recorder:
    """Stands for torchvision's function that applies an operation, and notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def __call__(self, image: Any, name: str, magnitude: float, **_: Any) -> Any:
        self.calls.append((name, round(magnitude, 4)))
        return image


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_and_magnitudes_have_torchvisions_distribution(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    random.seed(0)
    count, size = (3000 if policy == "augmix" else 12000), 96
    made: dict[str, Any] = {
        "ta_wide": autoaugment.TrivialAugmentWide,
        "ra": autoaugment.RandAugment,
        "augmix": autoaugment.AugMix,
    }
    if policy in made:
        transform = made[policy]()
    else:
        transform = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(policy))
    recorder = Recorder()
    monkeypatch.setattr(autoaugment, "_apply_op", recorder)
    blank = torch.zeros(3, size, size, dtype=torch.uint8)
    for _ in range(count):
        transform(blank)
    theirs: dict[tuple[str, float], int] = {}
    for call in recorder.calls:
        theirs[call] = theirs.get(call, 0) + 1

    numbers = uniforms(4, 0, Purpose.POLICY, np.arange(count), 0, numbers_needed(policy))
    draws = draw_policy(policy, size, numbers)
    ours: dict[tuple[str, float], int] = {}
    for place, magnitude in zip(
        draws.operations.ravel().tolist(), draws.magnitudes.ravel().tolist(), strict=True
    ):
        call = (OPERATIONS[place], round(magnitude, 4))
        ours[call] = ours.get(call, 0) + 1
    for counts in (ours, theirs):
        counts.pop(("Identity", 0.0), None)  # torchvision does not call anything where nothing is applied
        for call in [call for call in counts if call[1] == 0 and (call[0], -0.0) in counts]:
            counts[call[0], 0.0] = counts.pop(call)
    assert set(ours) == set(theirs)
    for call in theirs:
        assert abs(ours[call] - theirs[call]) < 5 * np.sqrt(ours[call] + theirs[call]) + 1, call


def test_augmix_weights_are_dirichlet() -> None:
    numbers = uniforms(4, 0, Purpose.POLICY, np.arange(4000), 0, numbers_needed("augmix"))
    weights = draw_policy("augmix", 96, numbers).weights
    assert weights is not None
    assert np.allclose(weights.sum(axis=1), 1)
    same_distribution(weights[:, 0], np.random.default_rng(0).beta(1, 1, 4000))
    theirs = np.random.default_rng(1).dirichlet([1, 1, 1], 4000) * np.random.default_rng(2).beta(
        1, 1, (4000, 1)
    )
    same_distribution(weights[:, 1], theirs[:, 0])


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.0, 2.0, 8.0])
def test_mixing_ratios_are_beta(alpha: float) -> None:
    ours = _beta(alpha, uniforms(1, 0, Purpose.MIX, np.arange(20000), 0, 1)[:, 0])
    same_distribution(ours, np.random.default_rng(0).beta(alpha, alpha, 20000))


def test_mixed_targets_weigh_the_pixels_that_are_there() -> None:
    keys = TrainOrder(4000, 4000, seed=0).rank_batch(0, 0)
    draws = draw_mix(3, 0, keys, (64, 48), 0.2, 1.0)
    cut = (draws.box[:, 1] > draws.box[:, 0]) & (draws.box[:, 3] > draws.box[:, 2])
    area = (draws.box[:, 1] - draws.box[:, 0]) * (draws.box[:, 3] - draws.box[:, 2]) / (64 * 48)
    assert np.allclose(draws.share[cut], 1 - area[cut])
    assert np.allclose(draws.share[~cut], draws.pixels[~cut])
    assert 0.46 < cut.mean() < 0.54
    assert np.array_equal(draws.share, draws.share[draws.partner])
