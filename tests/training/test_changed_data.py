"""A run that goes on with other data than it began with: other classes are refused, other images noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_runs import CLASSES, make_images, records, run

from scalesnn.base import UserError
from scalesnn.cli import main
from scalesnn.training.data_identity import check_data

BEFORE = {"classes": ["ant", "bee", "cat"], "train_images": 9, "test_images": 3, "fingerprint": "f"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with data and a run that stands at batch 3 of 4 of the second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    make_images(folder / "data", 4, 1)
    result = run(
        "--data-path", folder / "data", "--output-dir", folder / "runs", "--run-name=r", "--max-steps=7"
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def resume(folder: Path, *words):
    flags = (
        "--data-path",
        folder / "data",
        "--output-dir",
        folder / "runs",
        "--run-name=r",
        "--resume=latest",
    )
    return run(*flags, *words)


def test_other_classes_are_refused_by_name_before_shapes_are(copy):
    for split in ("train", "val"):
        (copy / "data" / split / "cat").rename(copy / "data" / split / "zebra")
        shutil.copytree(copy / "data" / split / "dog", copy / "data" / split / "yak")
    result = resume(copy)
    assert result.returncode == 2
    assert "4 then, 5 now, cat missing now, yak, zebra new" in result.stderr
    assert "Traceback" not in result.stderr
    assert records(copy / "runs", "step")[-1]["step"] == 7


def test_removed_images_are_noticed_and_an_epoch_beyond_its_end_is_over(copy):
    for name in CLASSES:
        for number in (2, 3):
            (copy / "data" / "train" / name / f"{number}.jpg").unlink()
    result = resume(copy)
    assert result.returncode == 0, result.stderr
    assert (
        "16 training and 4 test images then, 8 training and 4 test images now"
        in result.stdout + result.stderr
    )
    assert records(copy / "runs", "step")[-1]["step"] == 9  # two of the third epoch


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_export_holds_the_class_names(stopped, suffix, tmp_path):
    output = tmp_path / f"net.{suffix}"
    assert main(["export", str(stopped / "runs" / "r"), "-o", str(output)]) == 0
    if suffix == "pt":
        stored = torch.load(output, weights_only=True)._metadata["classes"]
    else:
        with safe_open(output, "pt") as file:
            stored = file.metadata()["classes"]
    assert json.loads(stored) == list(CLASSES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ["ant", "cat", "bee"]}, "label 1 is cat, was bee"),
        ({"classes": ["ant", "bee"]}, "3 then, 2 now, cat missing now"),
        ({"classes": ["ant", "bee", "caf\udce9"]}, "caf\ufffd new"),
        ({"classes": [*"abcdefg"]}, "a, b, c and 4 more new"),
    ],
)
def test_other_classes_are_told(change, words):
    with pytest.raises(UserError) as refused:
        check_data(BEFORE, {**BEFORE, **change}, "step_7")
    assert words in str(refused.value)


def test_what_is_no_other_data():
    assert check_data(BEFORE, dict(BEFORE), "step_7") == []
    assert check_data(None, BEFORE, "step_7") == []  # a checkpoint of an earlier version
    assert check_data(BEFORE, None, "step_7") == []
    (line,) = check_data(BEFORE, {**BEFORE, "fingerprint": "g"}, "step_7")
    assert "other names or labels of the 9 training and 3 test images" in line
