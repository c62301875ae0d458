"""The report's charts as PNG files, for papers, chats and machines without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalesnn.tracking.report_data import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_pictures"]

_COLOURS = ("#1c7ed6", "#e8590c", "#2b8a3e", "#ae3ec9", "#b08900", "#0c8599", "#c2255c", "#5f3dc4")
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4cbd6",
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "grid.color": "#edf0f4",
    "xtick.color": "#667085",
    "ytick.color": "#667085",
    "font.size": 9.5,
    "figure.dpi": 130,
    "savefig.bbox": "tight",
}


def write_pictures(runs: list[RunData], folder: Path) -> list[Path]:
    """Write accuracy.png, loss.png, speed.png, memory.png, and firing_rates.png (one panel a run) into
    ``folder``.

    A picture whose metrics no run has is left out.

    Returns:
        the files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    curves = {
        "accuracy": ("Top-1, %", [("test:acc1", "test", "-"), ("train:acc1", "train", "--")], 1.0),
        "loss": ("Loss", [("test:loss", "test", "-"), ("train:loss", "train", "--")], 1.0),
        "loss_steps": ("Loss of each step", [("loss", "", "-")], 1.0),
        "speed": ("Images a second", [("images_per_s", "", "-")], 1.0),
        "memory": ("Peak memory, GiB", [("memory/peak_bytes", "", "-")], 2.0**-30),
    }
    with pyplot.rc_context(_STYLE):
        for name, (title, metrics, scale) in curves.items():
            if any(run.values(metric) for run in runs for metric, _, _ in metrics):
                figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
                _curves(axes, runs, metrics, scale)
                axes.set_title(title)
                figure.savefig(folder / f"{name}.png")
                pyplot.close(figure)
                written.append(folder / f"{name}.png")
        measured = [run for run in runs if run.health]
        if measured:
            rows = max(len(run.health[-1]["layers"]) for run in measured)
            size = (1.2 + 3.6 * len(measured), 1.4 + 0.22 * rows)
            figure, panels = pyplot.subplots(
                1, len(measured), figsize=size, squeeze=False, layout="constrained"
            )
            for axes, run in zip(panels[0], measured, strict=True):
                _firing_rates(axes, run)
            figure.savefig(folder / "firing_rates.png")
            pyplot.close(figure)
            written.append(folder / "firing_rates.png")
    return written


def _curves(axes: Axes, runs: list[RunData], metrics: list[tuple[str, str, str]], scale: float) -> None:
    for place, run in enumerate(runs):
        for metric, label, dash in metrics:
            series = run.series.get(metric, {"step": [], "y": []})
            pairs = zip(series["step"], series["y"], strict=True)
            points = [(x, y * scale) for x, y in pairs if y is not None]
            if points:
                name = " ".join(part for part in (run.name[:32] if len(runs) > 1 else "", label) if part)
                marker = "o" if len(points) < 40 else ""
                colour = _COLOURS[place % len(_COLOURS)]
                axes.plot(*zip(*points, strict=True), dash, c=colour, label=name, marker=marker, markersize=3)
    axes.set_xlabel("step")
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=8)


def _firing_rates(axes: Axes, run: RunData) -> None:
    sample: dict[str, Any] = run.health[-1]
    layers = list(sample["layers"])
    picture = axes.imshow(
        [sample["layers"][layer]["firing_rate_t"] for layer in layers], aspect="auto", cmap="viridis", vmin=0
    )
    axes.grid(False)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_xticks(range(len(sample["layers"][layers[0]]["firing_rate_t"])))
    axes.set_xlabel("time-step")
    axes.set_title(f"Firing rate, step {sample['step']}\n{run.name[:36]}", fontsize=9)
    axes.figure.colorbar(picture, ax=axes, shrink=0.8)
