"""Event frames as SpikingJelly writes them, through launch/train.py: T and channels are the data's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from small_runs import ROOT, SMALL, environment, records
from torch.utils.data import RandomSampler, SequentialSampler

from scalesnn.model.train_imagenet_example import SResNetTrainer

FLAGS = [flag for flag in SMALL if not flag.startswith(("--T", "--epochs"))]


def write_frames(folder: Path, count: int, shape: tuple[int, ...], seed: int) -> None:
    """``count`` files a class of three classes; each class has its events in another place."""
    draw = np.random.default_rng(seed)
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for number in range(count):
            frames = draw.poisson(0.3, shape).astype(np.float32)
            frames[..., 8 * label : 8 * label + 8] += draw.poisson(3.0, (*shape[:-1], 8))
            np.savez_compressed(folder / str(label) / f"user{number}.npz", frames=frames)


@pytest.fixture
def gestures(tmp_path: Path) -> Path:
    """DVS128 Gesture's layout: T = 3, two channels, 24 x 24."""
    root = tmp_path / "DVS128Gesture"
    for split, count in (("train", 8), ("test", 3)):
        write_frames(root / "frames_number_3_split_by_number" / split, count, (3, 2, 24, 24), len(split))
        (root / "events_np" / split).mkdir(parents=True)
    return root


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """CIFAR10-DVS's layout: no splits; T = 5, two channels, 16 x 24."""
    root = tmp_path / "CIFAR10DVS"
    write_frames(root / "frames_number_5_split_by_time", 11, (5, 2, 16, 24), 0)
    (root / "download").mkdir()
    return root


def train(*words: object) -> SResNetTrainer:
    trainer = SResNetTrainer()
    trainer.main(trainer.get_args_parser().parse_args([*FLAGS, *map(str, words)]))
    return trainer


def test_gestures_train_from_another_folder(gestures: Path, tmp_path: Path) -> None:
    words = [*FLAGS, "--data-path", "DVS128Gesture", "--output-dir", "runs", "--run-name", "gestures"]
    line = [sys.executable, str(ROOT / "launch/train.py"), *words, "--epochs", "1"]
    result = subprocess.run(
        line, capture_output=True, text=True, timeout=150, env=environment(), cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "the data are in DVS128Gesture/frames_number_3_split_by_number" in result.stdout
    assert "[T, C, H, W] = [3, 2, 24, 24]" in result.stdout
    settings = yaml.safe_load((tmp_path / "runs/gestures/config.yaml").read_text())["settings"]
    assert (settings["T"], settings["in_channels"]) == (3, 2)
    assert len(records(tmp_path / "runs", "step")) == 6
    assert len(records(tmp_path / "runs", "epoch", "test")) == 1


def test_objects_are_split_as_spikingjelly_splits_them(
    objects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = train(
        "--data-path", objects, "--output-dir", tmp_path / "runs", "--max-steps", "2", "--in-channels", "2",
        "--T", "5", "--model", "sew_resnet18",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "is not split: the last tenth of each class is for validation" in said
    data = trainer.run.data
    assert (len(data.train.index), len(data.val.index)) == (30, 3)
    assert data.val.index.names == ["0/user9.npz", "1/user9.npz", "2/user9.npz"]
    first = next(m for m in trainer.run.strategy.module.modules() if isinstance(m, torch.nn.Conv2d))
    assert tuple(first.weight.shape) == (64, 2, 7, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--in-channels", "3"], "--in-channels 3, but the data are event frames of 2 channels"),
        (["--T", "4"], "--T 4, but the frames have 5 time-steps"),
    ],
)
def test_flags_that_contradict_the_frames(
    words: list[str], message: str, objects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train("--data-path", objects, "--output-dir", tmp_path / "runs", *words)
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_images_have_three_channels(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train("--data-path", images, "--output-dir", tmp_path, "--in-channels", "1")
    assert "--in-channels 1, but the data are images of 3 channels" in capsys.readouterr().err


def test_pretrained_weights_get_a_stem_and_a_head_for_the_frames(
    objects: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, cache / "resnet18-f37072fd.pth")
    words = ["--data-path", objects, "--output-dir", tmp_path / "runs", "--pretrained"]
    trainer = train(*words, "--max-steps", "1", "--lr", "0")
    own = trainer.run.strategy.module.state_dict()
    assert torch.equal(own["layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])
    assert (own["conv1.weight"].shape[1], len(own["fc.weight"])) == (2, 3)
    assert "a new classifier for 3 classes" in caplog.text
    assert "a new first convolution for 2 channels" in caplog.text
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train(*words, "--test-only")
    assert "weights are for 1000 classes and 3 channels, the data have 3 and 2" in capsys.readouterr().err


def test_several_numbers_of_frames_are_not_chosen_from(
    gestures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gestures / "frames_number_16_split_by_number" / "train").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        train("--data-path", gestures, "--output-dir", tmp_path / "runs")
    said = capsys.readouterr().err
    assert "holds frames_number_16_split_by_number, frames_number_3_split_by_number: name one" in said


class Recorded(torch.utils.data.Dataset):
    """A data set of one's own: frames [T, C, H, W] or images [C, H, W], drawn anew at each look."""

    classes = ("left", "right")

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return torch.rand(self.shape) + place % 2, place % 2


@pytest.mark.parametrize(("shape", "time_steps"), [((3, 2, 24, 24), 3), ((1, 24, 24), 4)])
def test_a_data_set_of_ones_own_says_its_channels_too(
    shape: tuple[int, ...], time_steps: int, tmp_path: Path
) -> None:
    class Mine(SResNetTrainer):
        def load_data(self, args: Any) -> Any:
            train, test = Recorded(*shape), Recorded(*shape)
            return train, test, RandomSampler(train), SequentialSampler(test)

    trainer = Mine()
    words = [*FLAGS, "--workers", "0", "--max-steps", "1", "--output-dir", str(tmp_path)]
    trainer.main(trainer.get_args_parser().parse_args(words))
    args = trainer.run.args
    assert (args.T, args.in_channels) == (time_steps, shape[-3])
