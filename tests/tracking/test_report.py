"""`scalesnn report`: a page that opens offline, in a real browser, without an error on its console."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from scalesnn.base import UserError
from scalesnn.tracking import create_tracker
from scalesnn.tracking.report import add_report_command, short_names, write_report
from scalesnn.tracking.report_data import config_differences, load_run, thinned

LAYERS = ("sn1", "layer1.0.sn1", "layer1.0.sn2")


def make_run(args: argparse.Namespace, folder: Path, lr: float, steps: int = 40) -> Path:
    """A run's folder as the trainer leaves it, with one NaN, an alert, and a name that tries to break the
    page.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"settings": {"model": "sew_resnet18", "T": 2, "lr": lr}})
    )
    tracker = create_tracker(args, folder, {}, total_steps=steps)
    for step in range(1, steps + 1):
        record = {"step": step, "epoch": (step - 1) // 10, "images_seen": 8 * step, "lr": lr}
        record.update(
            {"loss": float("nan") if step == 7 else 2 / step, "acc1": float(step), "images_per_s": 100.0}
        )
        record.update({"step_s": 0.1, "data_wait_s": 0.01, "time/forward_s": 0.03, "time/backward_s": 0.05})
        record.update({"memory/peak_bytes": 2.0**30, "device_hours": step / 3600})
        if step % 10 == 0:
            for place, layer in enumerate(LAYERS):
                record[f"spikes/{layer}/firing_rate"] = 0.1 * place
                record[f"spikes/{layer}/firing_rate_t"] = [0.05 * place, 0.15 * place]
                record[f"spikes/{layer}/dead_share"] = 0.5
                record[f"spikes/{layer}/saturated_share"] = 0.0
                record[f"membrane/{layer}/active_share"] = 0.2
                record[f"gradient_norm/{layer}"] = 0.1 + place
            record.update(
                {"spikes/firing_rate": 0.1, "spikes/dead_share": 0.5, "energy/snn_mj_per_image": 0.1}
            )
            record.update({"energy/ann_mj_per_image": 0.3, "energy/ann_over_snn": 3.0})
        tracker.log_step(record)
        if step % 10 == 0:
            for split in ("train", "test"):
                tracker.log_epoch({**record, "split": split, "acc1": 50 + step, "acc5": 90.0})
    tracker.alert("dead layer", "</script><script>throw 1</script>")
    tracker.close({"best_acc1": 90.0})
    return folder


@pytest.fixture
def run(tracking_args: argparse.Namespace, tmp_path: Path) -> Path:
    return make_run(tracking_args, tmp_path / "first", lr=0.1)


def browse(page: Path, query: str = "") -> tuple[str, list[str]]:
    """Open ``page`` in headless Chromium without a network: the document afterwards, and the console's
    lines.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(
                "--host-resolver-rules=MAP * ~NOTFOUND",
                "--virtual-time-budget=2000",
                "--window-size=1300,2000",
            ),
            *("--enable-logging=stderr", "--dump-dom", f"--user-data-dir={page.parent / 'browser'}"),
            f"{page.as_uri()}{query}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_page_of_a_run_draws_everything_in_a_browser_without_console_errors(
    run: Path, tmp_path: Path
) -> None:
    document, console = browse(write_report([run], tmp_path / "out"))
    assert console == []
    assert 'data-ready="yes"' in document
    for title in (
        "Top-1, %",
        "Loss of each step",
        "Where a step's time goes",
        "Peak memory",
        "Energy an image",
    ):
        assert title in document
    assert document.count("<svg") >= 16
    heat = document[document.index('data-map="rates"') :]
    assert heat[: heat.index("</svg>")].count("<rect") == len(LAYERS) * 2 + 30  # cells and the colour bar
    assert "throw 1" in document


def test_page_of_two_runs_compares_them(tracking_args, run: Path, tmp_path: Path) -> None:
    other = make_run(tracking_args, tmp_path / "second", lr=0.3, steps=30)
    document, console = browse(write_report([run, other], tmp_path / "out"), "?theme=dark")
    assert console == []
    assert 'data-theme="dark"' in document
    assert document.count('class="chip"') == 2
    differences = document[document.index("Where the runs differ") :]
    assert re.search(r"settings\.lr</td><td>0\.1</td><td>0\.3", differences)
    assert "settings.model" not in differences[: differences.index("all settings")]


def test_the_browser_check_sees_a_broken_page(run: Path, tmp_path: Path) -> None:
    page = write_report([run], tmp_path / "out")
    page.write_text(page.read_text().replace("const RUNS = DATA.runs;", "const RUNS = DATA.nothing.runs;"))
    document, console = browse(page)
    assert any("TypeError" in line for line in console)
    assert 'data-ready="yes"' not in document


def test_page_asks_nothing_of_a_network(run: Path, tmp_path: Path) -> None:
    text = write_report([run], tmp_path / "out").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}


def test_pictures_are_written_and_not_blank(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "out")
    names = {"accuracy", "loss", "loss_steps", "speed", "memory", "firing_rates"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == names
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width > 300
            assert len(picture.convert("L").getcolors(256) or []) > 5


def test_command_writes_beside_the_run_and_says_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_report_command(parser.add_subparsers())
    args = parser.parse_args(["report", str(run)])
    assert args.run(args) == 0
    assert str(run / "report" / "report.html") in capsys.readouterr().out
    assert (run / "report" / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused_with_a_hint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean .*first"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="is not the folder of a run"):
        load_run(tmp_path / "nowhere")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no metrics yet"):
        load_run(run)


def test_hours_count_computing_and_not_the_pause_between_processes(tmp_path: Path) -> None:
    records = [(1, 1000.0), (2, 4600.0), (3, 103_600.0)]  # an hour, then a pause of a day, then an hour
    lines = [{"kind": "step", "step": s, "epoch": 0, "loss": 1.0, "time": at} for s, at in records]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [{"event": "start", "time": 1000.0}, {"event": "start", "time": 100_000.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    assert load_run(tmp_path).series["loss"]["hours"] == [0.0, 1.0, 2.0]


def test_thinning_keeps_every_extreme() -> None:
    y: list[float | None] = [0.0] * 10_000
    y[1234], y[7777], y[5000] = 9.0, -9.0, None
    series = thinned({"step": list(range(10_000)), "y": y}, most=500)
    assert len(series["y"]) <= 510
    kept = [value for value in series["y"] if value is not None]
    assert (max(kept), min(kept)) == (9.0, -9.0)
    assert series["step"] == sorted(series["step"])


def test_settings_that_agree_are_no_difference(run: Path, tracking_args, tmp_path: Path) -> None:
    runs = [load_run(run), load_run(make_run(tracking_args, tmp_path / "second", lr=0.3))]
    assert config_differences(runs) == [("settings.lr", [0.1, 0.3])]


def test_names_in_a_legend_are_short_and_distinct() -> None:
    assert short_names(["a_b32_lr0.1_T4", "a_b32_lr0.2_T4"]) == ["lr0.1", "lr0.2"]
    assert short_names(["a_b", "a_b"]) == ["run 1", "run 2"]
