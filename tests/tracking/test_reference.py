"""Published runs to compare with: on track or not, the linear rule, the curve in the report."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from scalesnn.base import UserError
from scalesnn.cli import main as command
from scalesnn.configs import FOLDER
from scalesnn.tracking import create_tracker
from scalesnn.tracking.reference import load_reference

SHIPPED = sorted(path.stem for path in (FOLDER / "references").glob("*.yaml"))


def make_run(args: argparse.Namespace, folder: Path, top1: list[float], **settings: object) -> Path:
    """A run's folder with one evaluation an epoch, of 10 steps each."""
    folder.mkdir(parents=True)
    given = {"model": "sew_resnet34", "T": 4, "epochs": 320, "lr": 0.1, "batch_size": 32, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump({"settings": given, "world_size": 8}))
    tracker = create_tracker(args, folder, {}, total_steps=10 * len(top1))
    for epoch, value in enumerate(top1):
        record = {"step": 10 * (epoch + 1), "epoch": epoch, "images_seen": 2560 * (epoch + 1)}
        tracker.log_step({**record, "loss": 1.0})
        tracker.log_epoch({**record, "split": "test", "acc1": value, "acc5": 90.0, "loss": 1.0})
    tracker.close({})
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_curves_rise_and_say_where_they_are_from(name: str) -> None:
    reference = load_reference(name)
    values = list(reference.top1.values())
    assert values == sorted(values)
    assert all(0 < value < 80 for value in values)
    assert "github.com/" in reference.source
    assert (reference.settings["lr"], reference.settings["global_batch"]) == (0.1, 256)


def test_the_issue_s_figures() -> None:
    epochs = (1, 5, 10, 50, 100, 200)
    for name, values in {
        "sew_resnet18": (14.0, 38.1, 46.0, 56.9, 58.9, 61.5),
        "sew_resnet34": (12.6, 39.9, 48.6, 61.2, 63.6, 65.9),
        "sew_resnet50": (9.4, 35.8, 47.5, 62.7, 65.5, 67.0),
        "psn_resnet34": (42.1, 57.8, 62.1, 68.1, 69.4, 70.2),
    }.items():
        assert [load_reference(name).expected(epoch) for epoch in epochs] == list(values)


def test_between_known_epochs_the_curve_is_linear_in_the_logarithm() -> None:
    reference = load_reference("sew_resnet34")
    assert reference.expected(7) == pytest.approx(39.9 + (48.6 - 39.9) * math.log(7 / 5) / math.log(2))
    assert reference.expected(321) is None
    assert load_reference("spiking_resnet18").expected(10) is None


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(1, 12.0), (5, 37.5)], "on track since epoch 1: 37.5 % after 5 epochs, expected 39.9 %"),
        (
            [(1, 12.0), (5, 36.0), (10, 40.0)],
            "behind since epoch 5: 40.0 % after 10 epochs, expected 48.6 %; 1.5 points below are let pass",
        ),
        ([(1, 2.0), (5, 20.0), (10, 48.0)], "on track since epoch 10: 48.0 % after 10 epochs"),
        ([(10, 47.0)], "behind since epoch 10: 47.0 %"),
        ([(5, 90.0)], "on track since epoch 5: 90.0 %"),
        ([], "nothing to compare yet: no evaluated epoch between 1 and 320"),
    ],
)
def test_on_track_or_not_and_since_when(points: list[tuple[int, float]], said: str) -> None:
    assert load_reference("sew_resnet34").verdict(points).startswith(said)


def test_another_global_batch_is_told_the_linear_rule_s_value() -> None:
    notice = load_reference("sew_resnet34").notice
    assert "67.04 % top-1 after 320 epochs; its --lr 0.1 is for a global batch of 256" in notice(0.1, 256)
    assert "linear rule" not in notice(0.1, 256)
    assert "for this run's 64 the linear rule gives --lr 0.025, and not 0.1" in notice(0.1, 64)
    assert "for this run's 1024 the linear rule gives --lr 0.4, as given" in notice(0.4, 1024)


def data_of(page: Path) -> dict:
    found = re.search(r'<script id="data"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"), flags=re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_report_draws_the_curve_and_says_where_the_run_stands(
    tracking_args: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tracking_args, tmp_path / "mine", [12.0, 24.0, 30.0, 33.0, 30.0, 29.0], epochs=90, T=8)
    assert command(["report", str(run), "--reference", "sew_resnet34"]) == 0
    said = capsys.readouterr().out
    verdict = "behind since epoch 4: 29.0 % after 6 epochs, expected 42.2 %; 3.0 points below are let pass"
    assert (
        f"mine against sew_resnet34: {verdict} (the run has T 8 instead of 4, epochs 90 instead of 320)"
        in said
    )
    data = data_of(run / "report" / "report.html")
    mine, reference = data["runs"]
    curve = reference["series"]["test:acc1"]
    assert curve["epoch"] == list(range(10))  # up to the next known epoch
    assert (curve["y"][0], curve["y"][4], curve["y"][9]) == (12.6, 39.9, 48.6)
    assert curve["step"] == [10 * epoch for epoch in range(1, 11)]
    assert curve["images_seen"][-1] == 25600
    assert [
        "against sew_resnet34",
        f"{verdict} (the run has T 8 instead of 4, epochs 90 instead of 320)",
    ] in mine["facts"]
    assert dict(data["differences"]) == {
        "settings.T": [8, 4],
        "settings.epochs": [90, 320],
        "settings.global_batch": [None, 256],
    }
    assert (run / "report" / "accuracy.png").stat().st_size > 5000


def test_the_run_s_own_reference_is_drawn_unless_another_is_given(
    tracking_args: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tracking_args, tmp_path / "mine", [13.0], reference="sew_resnet18")
    assert command(["report", str(run)]) == 0
    assert "mine against sew_resnet18: on track since epoch 1: 13.0 %" in capsys.readouterr().out
    gone = make_run(tracking_args, tmp_path / "gone", [13.0], reference="/nowhere.yaml")
    assert command(["report", str(gone)]) == 0
    assert "against" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "none of the shipped ones: psn_resnet34, sew_resnet18"),
        ("top1: {1: 3.0}", "expected source, model, T, epochs, lr, global_batch, and top1"),
        ("[", "expected source, model"),
        (
            "source: x\nmodel: m\nT: 1\nepochs: 2\nlr: 0.1\nglobal_batch: 8\ntop1: {0: 3}",
            "epochs begin with 1",
        ),
    ],
)
def test_what_is_no_reference_is_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    name = "nonsense"
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
        name = str(tmp_path / "mine.yaml")
    with pytest.raises(UserError) as caught:
        load_reference(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
