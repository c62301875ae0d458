"""Small image folders, and the flags of a run on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scalesnn.data import Data, add_data_arguments, open_data


def _picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth coloured picture with some noise, uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [
        127 + 80 * np.sin(columns / draw.uniform(8, 40)) + 40 * np.cos(rows / draw.uniform(5, 50))
        for _ in range(3)
    ]
    noisy = np.stack(channels, axis=-1) + draw.normal(0, 6, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _make_folder(root: Path, train: int, val: int, smallest: int = 40, largest: int = 90) -> Path:
    """``train`` and ``val`` JPEGs of random sizes, dealt out to three classes."""
    sizes = np.random.default_rng(train * 1000 + val)
    for split, count in (("train", train), ("val", val)):
        for number in range(max(count, 3)):
            folder = root / split / f"class_{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            if number < count:
                height, width = sizes.integers(smallest, largest, 2)
                Image.fromarray(_picture(number, height, width)).save(
                    folder / f"{number:04d}.jpg", quality=92
                )
    return root


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int, int], np.ndarray]:
    """``picture(seed, height, width)`` → uint8 [height, width, 3]."""
    return _picture


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """``make_folder(root, train, val, smallest=…, largest=…)`` → the root of an image folder."""
    return _make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 training and 25 validation images of 40 to 90 pixels in three classes."""
    return _make_folder(tmp_path_factory.mktemp("images"), 61, 25)


@pytest.fixture
def open_loaders() -> Any:
    """``open_loaders(folder, *flags, batch_size=…, rank=…)`` → Data; closed after the test."""
    opened: list[Data] = []

    def opener(root: Path | None, *flags: str, **settings: Any) -> Data:
        parser = argparse.ArgumentParser()
        add_data_arguments(parser)
        path = [] if root is None else ["--data-path", str(root)]
        small = ["--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32", "-j", "1"]
        args = parser.parse_args([*path, *small, *flags])
        for name in [name for name in settings if name == "output_dir"]:
            setattr(args, name, settings.pop(name))
        data = open_data(args, **{"batch_size": 6, "seed": 5, **settings})
        opened.append(data)
        return data

    yield opener
    for data in opened:
        data.close()
