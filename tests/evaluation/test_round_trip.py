"""From a training at T = 2 to others' simulators at T = 4, with the same figures all along."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CLASSES, records
from trained_nets import FLAGS

from scalesnn.cli import main
from scalesnn.data.augment import Recipe
from scalesnn.evaluation.predict import read_image


def evaluate(source: Path, images: Path, file: Path, *words: str) -> dict[str, Any]:
    flags = ["--data-path", str(images), "--loader=torchvision", "--json", str(file), *FLAGS]
    assert main(["evaluate", str(source), *flags, *words]) == 0
    return json.loads(file.read_text())


@torch.no_grad()
def hits(reader: Any, batch: torch.Tensor, targets: torch.Tensor, T: int) -> int:
    """Right answers of somebody else's net, run for T steps."""
    reader.eval()
    total, state = 0, None
    for _ in range(T):
        logits, state = reader(batch) if state is None else reader(batch, state)
        total = total + logits
    return int((total.argmax(1) == targets).sum())


@pytest.mark.long
def test_from_a_training_to_two_simulators(run: Path, images: Path, tmp_path: Path, train: Any) -> None:
    nir = pytest.importorskip("nir")
    sj = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    snn = pytest.importorskip("snntorch.import_nir")
    weights, figures = tmp_path / "first.safetensors", tmp_path / "figures.json"
    (trained,) = records(run.parent, "epoch", "test")

    assert main(["export", str(run), "-o", str(weights)]) == 0
    exported = evaluate(weights, images, figures, "--test-T=2,4", "--loader=auto")
    assert exported["accuracy"][0]["acc1"] == pytest.approx(trained["acc1"], rel=1e-6)

    tuned = train(images, tmp_path, "tuned", "--init-from", str(weights), "--T=4", "--loader=torchvision")
    (began,) = records(tuned.parent, "epoch", "test")
    found = evaluate(tuned, images, figures)
    assert found["loss"] == began["loss"]
    assert found["acc1"] == began["acc1"]
    (accuracy,) = found["accuracy"]
    assert accuracy["T"] == 4

    table = tmp_path / "energy.csv"
    flags = ["--data-path", str(images), "--csv", str(table), *FLAGS]
    assert main(["energy", str(tuned), *flags]) == 0
    rows = [row for row in csv.DictReader(table.open()) if row["fed_with"]]
    assert [row["T"] for row in rows] == ["4"] * 21
    assert sum(float(row["synops"]) for row in rows) > 1e4

    assert main(["export", str(tuned), "-o", str(tmp_path / "net.nir")]) == 0
    files = sorted((images / "val").rglob("*.jpg"))
    recipe = Recipe(val_resize_size=24, val_crop_size=24)
    batch = torch.stack([read_image(file, recipe) for file in files])
    targets = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    for read in (sj.import_from_nir, snn.import_from_nir):
        right = hits(read(nir.read(tmp_path / "net.nir")), batch, targets, 4)
        assert right == round(accuracy["acc1"] * len(files) / 100)
