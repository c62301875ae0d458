"""``scalesnn evaluate`` and ``predict``: training's own figure, several T in one pass, bad input."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import CLASSES, SMALL, environment, make_images, records
from torch import nn
from trained_nets import FLAGS, lively, save_lively

from scalesnn import layer, neuron
from scalesnn.cli import main
from scalesnn.data.opening import SAMPLE
from scalesnn.evaluation.trainer import prefixes_hold
from scalesnn.model.sew_resnet import sew_resnet18


def figures(tmp_path: Path, *words: object) -> dict[str, Any]:
    """Run ``scalesnn evaluate``; what --json wrote."""
    file = tmp_path / "figures.json"
    assert main(["evaluate", *map(str, words), *FLAGS, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def code_of(words: list[str]) -> object:
    """The exit code, whoever ends the command: the parser or the command itself."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("ema", [False, True])
def test_the_figure_is_that_of_training_s_own_evaluation(run: Path, tmp_path: Path, ema: bool) -> None:
    (trained,) = records(run.parent, "epoch", "ema_test" if ema else "test")
    found = figures(tmp_path, run, *["--ema"] * ema)
    (accuracy,) = found["accuracy"]
    assert found["loss"] == trained["loss"]
    assert (found["acc1"], found["acc5"]) == (trained["acc1"], trained["acc5"])
    assert accuracy["images"] == 20
    assert accuracy["T"] == 2
    assert accuracy["acc1"] == pytest.approx(trained["acc1"], rel=1e-6)


def test_several_T_in_one_pass_are_those_of_a_pass_each(weights: Path, images: Path, tmp_path: Path) -> None:
    common = (weights, "--data-path", images)
    together = figures(tmp_path, *common, "--test-T", "4,1,2")
    assert [a["T"] for a in together["accuracy"]] == [1, 2, 4]
    for accuracy in together["accuracy"][1:]:
        alone = figures(tmp_path, *common, "--test-T", accuracy["T"])
        assert alone["accuracy"] == [accuracy]
    assert len({a["acc1"] for a in together["accuracy"]}) > 1, "this net's answers do not depend on T"
    assert together["loss"] == alone["loss"]


@pytest.mark.long
def test_classes_pairs_and_mirror_images(weights: Path, images: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "classes.csv"
    common = (weights, "--data-path", images, "--test-T", "1,2")
    plain = figures(tmp_path, *common, "--per-class", table)
    rows = list(csv.DictReader(table.open()))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert [row["images"] for row in rows] == ["5"] * 4
    for place, column in enumerate(("acc1_T1", "acc1_T2")):
        mean = sum(float(row[column]) for row in rows) / 4
        assert mean == pytest.approx(plain["accuracy"][place]["acc1"])
    wrong = sum(pair["images"] for pair in plain["confused"])
    assert wrong == round(20 * (100 - plain["accuracy"][1]["acc1"]) / 100)
    worst = plain["confused"][0]
    assert f"{worst['class']} taken for {worst['taken_for']}: {worst['images']}" in capsys.readouterr().out
    mirrored = figures(tmp_path, *common, "--flip")
    assert mirrored["loss"] != plain["loss"]
    assert mirrored["accuracy"][0]["images"] == 20


@pytest.mark.long
def test_mirror_images_of_mirror_images_are_the_same(weights: Path, images: Path, tmp_path: Path) -> None:
    from PIL import Image, ImageOps

    flipped = make_images(tmp_path / "DIR", 1, 0)
    for file in (images / "val").rglob("*.jpg"):
        target = flipped / file.relative_to(images).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as picture:
            ImageOps.mirror(picture).save(target)
    losses = [figures(tmp_path, weights, "--data-path", d, "--flip")["loss"] for d in (images, flipped)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.long
@pytest.mark.distributed
def test_two_ranks_count_every_image_once(weights: Path, tmp_path: Path) -> None:
    few = make_images(tmp_path / "few", 4, 2)
    shutil.copyfile(few / "val/bee/0.jpg", few / "val/bee/2.jpg")  # 9: one rank's second batch is empty
    common = ["evaluate", str(weights), "--data-path", str(few), "--test-T=1,2", "--flip", *FLAGS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "scalesnn.cli", *common, "--json", str(tmp_path / "two.json")]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two.json").read_text())
    one = figures(tmp_path, *common[1:])
    assert two["accuracy"] == one["accuracy"]
    assert two["confused"] == one["confused"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert done.stdout.count("most confused") == 1
    tables = [tmp_path / "two.csv", tmp_path / "one.csv"]
    words = ["energy", str(weights), "--data-path", str(few), "--T=2", *FLAGS, "--csv"]
    subprocess.run([*torchrun, "-m", "scalesnn.cli", *words, str(tables[0])], env=environment(), check=True)
    assert main([*words, str(tables[1])]) == 0
    of_two, of_one = ([row["synops"] for row in csv.DictReader(table.open())] for table in tables)
    assert of_two == of_one


@pytest.mark.long
def test_event_frames_have_a_T_of_their_own_that_can_be_shortened(tmp_path: Path, train, capsys) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for label in ("0", "1"):
            folder = tmp_path / "DVS/frames_number_3_split_by_number" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                np.savez_compressed(folder / f"{number}.npz", frames=draw.poisson(1.0, (3, 2, 24, 24)))
        (tmp_path / "DVS/events_np" / split).mkdir(parents=True)
    run = train(tmp_path / "DVS", tmp_path, "frames", given=[flag for flag in SMALL if "--T" not in flag])
    (trained,) = records(tmp_path, "epoch", "test")
    whole = figures(tmp_path, run)
    assert [a["T"] for a in whole["accuracy"]] == [3]
    assert (whole["loss"], whole["acc1"]) == (trained["loss"], trained["acc1"])
    shorter = figures(tmp_path, run, "--test-T=1,3")
    assert shorter["accuracy"][1:] == whole["accuracy"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--test-T=2,4"]) == 2
    assert capsys.readouterr().err.strip().endswith("--test-T 2,4: the frames have 3 time-steps")


def test_a_layer_that_looks_ahead_takes_a_pass_for_each_T() -> None:
    class Ahead(neuron.MemoryModule):
        pass

    class Parallel(neuron.IFNode):
        def multi_step_forward(self, x_seq, norm=None):
            return (x_seq.flip(0).cumsum(0) > 1).to(x_seq)

    causal = nn.Sequential(layer.Conv2d(3, 4, 1), neuron.LIFNode(), layer.Dropout(0.1))
    assert prefixes_hold(causal)
    assert not prefixes_hold(nn.Sequential(causal, Ahead()))
    assert not prefixes_hold(nn.Sequential(Parallel()))


@pytest.mark.parametrize(
    "command",
    ["evaluate", "export", *(pytest.param(c, marks=pytest.mark.long) for c in ("energy", "predict"))],
)
def test_bad_sources_are_one_line(
    command: str, run: Path, weights: Path, images: Path, tmp_path: Path, capsys
) -> None:
    code = tmp_path / "code.pt"
    torch.save({"model": subprocess.Popen}, code)
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    bare = tmp_path / "bare.pt"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(4, 512)}, bare)
    image = next((images / "val").rglob("*.jpg"))
    rest = {
        "evaluate": ["--data-path", str(images), *FLAGS],
        "energy": ["--data-path", str(images), *FLAGS],
        "predict": [str(image)],
        "export": ["-o", str(tmp_path / "out.onnx")],
    }[command]
    for source, flags, said in (
        ("nowhere", [], "no such file or run"),
        (tmp_path / "empty", [], "no checkpoint"),
        (code, [], "pickled code"),
        (tmp_path / "noise.safetensors", [], "damaged"),
        (bare, [], "does not say which net it is: give --model"),
        (bare, ["--model=sew_resnet18"], "it lacks bn1"),
        (weights, ["--model=spiking_resnet50"], "does not fit SpikingResNet"),
        (weights, ["--model=sew_resnet"], "unknown 'sew_resnet'"),
        (weights, ["--T=0"], "--T must be at least 1"),
        (weights, ["--ema"], "holds one set of weights"),
    ):
        capsys.readouterr()
        assert code_of([command, str(source), *rest, *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
        assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--test-T=two"], "--test-T is a list of time-steps"),
        (["--test-T=0,1"], "T must be at least 1"),
        (["--test-t=1"], "unknown flag '--test-t=1'"),
        (["--per-class=/no/such/folder/x.csv"], "--per-class /no/such/folder/x.csv: cannot be written"),
        (["--json=/no/such/folder/x.json"], "--json /no/such/folder/x.json: cannot be written"),
        (["--data-path=/no/such"], "--data-path /no/such: no such folder"),
    ],
)
def test_bad_flags_are_one_line(words: list[str], said: str, weights: Path, images: Path, capsys) -> None:
    code = code_of(["evaluate", str(weights), "--data-path", str(images), *FLAGS, *words])
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert said in error
    assert "\n" not in error


@pytest.mark.long
def test_a_run_on_the_shipped_images_is_evaluated_on_them(tmp_path: Path) -> None:
    net = lively(sew_resnet18(num_classes=10, spiking_neuron=neuron.LIFNode))
    classes = sorted(path.name for path in (SAMPLE / "val").iterdir())
    save_lively(tmp_path / "net.safetensors", net, classes, data_path=None, T=1)
    found = figures(tmp_path, tmp_path / "net.safetensors")
    assert found["accuracy"][0]["images"] == len(list((SAMPLE / "val").rglob("*.jpg")))
    assert found["accuracy"][0]["T"] == 1


def test_a_file_of_weights_is_not_exported_as_weights_again(weights: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", str(weights), "-o", str(tmp_path / "net.pt")]) == 2
    assert "is a file of weights already; --format nir, onnx and pt2 take it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_data_of_other_classes_are_refused(weights: Path, images: Path, tmp_path: Path, capsys) -> None:
    fewer = make_images(tmp_path / "fewer", 1, 1)
    for split in ("train", "val"):
        (fewer / split / "elk/0.jpg").unlink()
        (fewer / split / "elk").rmdir()
    other = make_images(tmp_path / "other", 1, 1)
    for split in ("train", "val"):
        (other / split / "elk").rename(other / split / "fox")
    for folder, said in ((fewer, "is for 4"), (other, "elk missing now, fox new")):
        assert main(["evaluate", str(weights), "--data-path", str(folder), *FLAGS]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error


@pytest.mark.long
def test_predict_says_what_evaluation_counts(weights: Path, images: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "classes.csv"
    figures(tmp_path, weights, "--data-path", images, "--per-class", table, "--loader=torchvision")
    files = sorted((images / "val").rglob("*.jpg"))
    capsys.readouterr()
    assert main(["predict", str(weights), *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(file) for file in files]
    right = dict.fromkeys(CLASSES, 0)
    for file, line in zip(files, lines, strict=True):
        right[file.parent.name] += line.split(": ")[1].startswith(f"{file.parent.name} ")
        assert sum(float(part.split()[1]) for part in line.split(": ")[1].split(", ")) == pytest.approx(
            100, abs=0.3
        )
    rows = csv.DictReader(table.open())
    assert {row["class"]: round(float(row["acc1_T2"]) / 20) for row in rows} == right


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.jpg", None, "No such file"),
        ("text.jpg", b"no image", "text.jpg: "),
        (".", None, "Is a directory"),
    ],
)
def test_images_that_cannot_be_read_are_one_line(
    weights: Path, tmp_path: Path, capsys, name: str, content: bytes | None, said: str
) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    assert main(["predict", str(weights), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_a_net_for_other_channels_predicts_no_images(images: Path, tmp_path: Path, capsys) -> None:
    net = lively(sew_resnet18(num_classes=2, spiking_neuron=neuron.LIFNode, in_channels=2))
    save_lively(tmp_path / "net.safetensors", net, ["a", "b"])
    image = next((images / "val").rglob("*.jpg"))
    assert main(["predict", str(tmp_path / "net.safetensors"), str(image)]) == 2
    assert "takes 2 channels: an image has 3" in capsys.readouterr().err
