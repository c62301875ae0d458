"""Accuracy and energy over T of the net that the shipped images train; docs/images/accuracy_energy.svg.

    python benchmarks/accuracy_energy.py

It trains the recipe ``sample`` (minutes on a CPU), then runs ``scalesnn evaluate`` once for all T and
``scalesnn energy`` once for each. ``--run RUN`` takes a run that is there.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, machine, save

from scalesnn.cli import main as scalesnn
from scalesnn.model.train_imagenet_example import SResNetTrainer

STEPS = (1, 2, 3, 4, 6, 8)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "accuracy_energy.svg"
WAYS = {  # how the energy was counted, as the table of scalesnn energy names it
    "exact_once": "SNN, exact, conv1 once (pJ)",
    "exact_T": "SNN, exact, conv1 T times (pJ)",
    "convention_once": "SNN, MACs·T·rate, conv1 once (pJ)",
    "ann": "ANN: every MAC once (pJ)",
}


def train(folder: Path) -> Path:
    """Train the recipe; returns the run."""
    trainer = SResNetTrainer()
    words = ["--config=sample", f"--output-dir={folder}", "--run-name=sample", "--wandb=disabled"]
    trainer.main(trainer.get_args_parser().parse_args(words))
    return folder / "sample"


def measure(run: Path, folder: Path) -> dict[str, Any]:
    """Accuracy at every T in one pass, then the energy at each."""
    figures = folder / "figures.json"
    steps = ",".join(map(str, STEPS))
    if scalesnn(["evaluate", str(run), f"--test-T={steps}", f"--json={figures}"]):
        raise SystemExit("evaluate failed")
    points = json.loads(figures.read_text(encoding="utf-8"))["accuracy"]
    for point in points:
        table = folder / "table.csv"
        if scalesnn(["energy", str(run), f"--T={point['T']}", f"--csv={table}"]):
            raise SystemExit("energy failed")
        with table.open(encoding="utf-8") as file:
            rows = {row["layer"]: float(row["exact_pj"]) for row in csv.DictReader(file)}
        for stem in (", conv1 once", ", conv1 T times"):  # at T = 1 there is no difference
            rows |= {
                name.replace(" (pJ)", f"{stem} (pJ)"): pj for name, pj in rows.items() if "conv1" not in name
            }
        point["mj"] = {way: rows[name] * 1e-9 for way, name in WAYS.items()}
    return {"machine": machine(), "recipe": "sample", "points": points}


def draw(record: dict[str, Any], file: Path) -> None:
    """The picture: accuracy with its interval on the left, energy on the right."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "scalesnn", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    points = record["points"]
    T = [point["T"] for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    acc1 = [point["acc1"] for point in points]
    left.plot(T, acc1, "o-", color="C0")
    left.fill_between(T, [p["acc1_low"] for p in points], [p["acc1_high"] for p in points], alpha=0.2)
    left.set(xlabel="T", ylabel="top-1 % (95 % interval)", xticks=T)
    for way, label, style in (
        ("exact_once", "SNN, exact, stem once", "o-"),
        ("exact_T", "SNN, exact, stem T times", "s--"),
        ("convention_once", "SNN, MACs·T·rate, stem once", "^:"),
        ("ann", "ANN", "k-"),
    ):
        right.plot(T, [1e3 * point["mj"][way] for point in points], style, label=label, markersize=4)
    right.set(xlabel="T", ylabel="µJ an image (45 nm, fp32)", xticks=T, ylim=(0, None))
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.0, 0.93))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="a run of the recipe sample (default: train one)")
    parser.add_argument("--draw-only", action="store_true", help="draw results/accuracy_energy.json")
    args = parser.parse_args()
    if args.draw_only:
        record = json.loads((RESULTS / "accuracy_energy.json").read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            record = measure(args.run or train(Path(folder)), Path(folder))
        save("accuracy_energy", record)
    draw(record, PICTURE)
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
