"""Images, a run of one epoch, and a file of weights whose answers differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CLASSES, SMALL, make_images, process_left_as_it_was
from torch import nn
from trained_nets import lively, save_lively

from scalesnn import functional, neuron
from scalesnn.data.augment import Recipe
from scalesnn.evaluation.predict import read_image
from scalesnn.model.sew_resnet import sew_resnet18
from scalesnn.model.train_imagenet_example import SResNetTrainer


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, 4 training and 5 validation images each: the last batch of 4 is not full on two ranks."""
    return make_images(tmp_path_factory.mktemp("images"), 4, 5)


def train_once(images: Path, folder: Path, name: str, *words: str, given: Sequence[str] = SMALL) -> Path:
    """Train one epoch of SEW-ResNet-18 with LIF neurons that fire from the start; returns the run."""
    trainer = SResNetTrainer()
    own = ["--data-path", str(images), "--output-dir", str(folder), "--run-name", name, "--epochs=1"]
    own += ["--model=sew_resnet18", "--neuron=LIF", "--tau=1.1", *words]
    with process_left_as_it_was():
        trainer.main(trainer.get_args_parser().parse_args([*given, *own]))
    return folder / name


@pytest.fixture(scope="session")
def train() -> Callable[..., Path]:
    """``train_once``."""
    return train_once


@pytest.fixture(scope="session")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch at T = 2, with averaged weights."""
    return train_once(images, tmp_path_factory.mktemp("runs"), "lif", "--model-ema", "--model-ema-steps=1")


@pytest.fixture(scope="session")
def weights(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as ``scalesnn export`` writes it, of a net whose layers all fire and whose answers differ."""
    torch.manual_seed(4)
    net: Any = lively(sew_resnet18(num_classes=len(CLASSES), spiking_neuron=neuron.LIFNode))
    recipe = Recipe(val_resize_size=24, val_crop_size=24)
    batch = torch.stack([read_image(file, recipe) for file in sorted((images / "val").rglob("*.jpg"))])
    functional.set_step_mode(net, "m")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of these very images
            module.momentum = 1.0
    with torch.no_grad():
        nn.init.normal_(net.fc.weight)
        net.train()(functional.repeat_over_time(batch, 2))
        functional.reset_net(net)
        net.fc.bias -= net.eval()(functional.repeat_over_time(batch, 2)).mean((0, 1))
    return save_lively(tmp_path_factory.mktemp("weights") / "net.safetensors", net, list(CLASSES))
