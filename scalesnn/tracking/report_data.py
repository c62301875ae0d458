"""What `scalesnn report` knows of a run: its metrics, events and settings, as plain data for the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scalesnn.base import UserError
from scalesnn.tracking.jsonl import read_jsonl
from scalesnn.tracking.reference import Reference

__all__ = ["RunData", "config_differences", "curve_of", "load_run", "thinned"]

MOST_POINTS = 1500
_LAYER_METRICS = {
    "firing_rate": "spikes/",
    "dead_share": "spikes/",
    "saturated_share": "spikes/",
    "active_share": "membrane/",
}
_AXES = ("step", "epoch", "images_seen", "hours")


@dataclass
class RunData:
    """One run.

    Attributes:
        series: metric → {"step", "epoch", "images_seen", "hours", "y"}, each a list of equal length. Metrics
            of step records have their own name, those of epoch records ``train:…``, ``test:…``,
            ``ema_test:…``.
        health: one item for each measurement of the spikes: step, and for each layer its figures.
        events: notices, alerts, starts, checkpoints, in order.
        config: flat settings, ``settings.lr`` → value.
    """

    name: str
    folder: Path
    series: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """The finite values of a metric, oldest first."""
        return [y for y in self.series.get(metric, {}).get("y", []) if y is not None]

    def best(self, metric: str) -> float | None:
        """The largest value of a metric."""
        return max(self.values(metric), default=None)

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        values = self.values(metric)
        return values[-1] if values else None

    def setting(self, name: str) -> Any:
        """A setting by its flag's name."""
        return self.config.get(f"settings.{name}", self.config.get(name))


def load_run(folder: Path) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: there is no metrics.jsonl, or it holds no record.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        below = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        hint = f": did you mean {below[0]}" if below else ""
        raise UserError(f"{folder} is not the folder of a run: it has no metrics.jsonl{hint}")
    records = read_jsonl(metrics)
    if not records:
        raise UserError(f"{metrics} holds no metrics yet")
    run = RunData(folder.resolve().name, folder, events=read_jsonl(folder / "events.jsonl"))
    run.config = _flat(_yaml(folder / "config.yaml"))
    hours = _Clock(run.events)
    for record in records:
        axes = {
            "step": record.get("step"),
            "epoch": record.get("epoch"),
            "images_seen": record.get("images_seen"),
            "hours": hours(record.get("time")),
        }
        of_an_epoch = record.get("kind") == "epoch"
        prefix = f"{record.get('split', 'train')}:" if of_an_epoch else ""
        for key, value in record.items():
            if key in ("step", "epoch", "images_seen", "time", "kind", "split") or _is_per_layer(key):
                continue
            if (number := _number(value)) is not None:
                _append(run.series.setdefault(prefix + key, {}), axes, number)
        if measured := _health(record):
            run.health.append(measured)
    run.series = {name: thinned(series) for name, series in run.series.items()}
    return run


def curve_of(reference: Reference, run: RunData) -> RunData:
    """A reference's curve as a run of its own, on the axes of ``run``, as far as the next known epoch after
    where that run is."""
    ends = run.series.get("test:acc1") or {axis: [] for axis in (*_AXES, "y")}
    done = max((epoch + 1 for epoch in ends["epoch"] if epoch is not None), default=0)
    known = list(reference.top1)
    last = next((epoch for epoch in known if epoch >= done), known[-1])
    curve = RunData(f"reference {reference.name}", run.folder)
    curve.config = {f"settings.{name}": value for name, value in reference.settings.items()}
    per_epoch = {axis: (ends[axis][-1] or 0) / done if done else 0 for axis in _AXES if axis != "epoch"}
    for epoch in range(known[0], last + 1):
        if (top1 := reference.expected(epoch)) is not None:
            axes = {axis: value * epoch for axis, value in per_epoch.items()}
            _append(curve.series.setdefault("test:acc1", {}), {**axes, "epoch": epoch - 1}, top1)
    return curve


def thinned(series: dict[str, list[Any]], most: int = MOST_POINTS) -> dict[str, list[Any]]:
    """At most about ``most`` points that keep each stretch's lowest and highest value, so that no spike is
    lost.
    """
    values = series["y"]
    if len(values) <= most:
        return series
    width = 2 * len(values) / most
    keep: set[int] = {0, len(values) - 1}
    for bucket in range(most // 2):
        places = range(int(bucket * width), min(int((bucket + 1) * width), len(values)))
        if len(places):
            finite = [i for i in places if values[i] is not None] or [places[0]]
            keep |= {min(finite, key=lambda i: values[i]), max(finite, key=lambda i: values[i])}
    return {axis: [column[i] for i in sorted(keep)] for axis, column in series.items()}


def config_differences(runs: list[RunData]) -> list[tuple[str, list[Any]]]:
    """Settings on which the runs differ: (name, a value for each run); None where a run does not have it."""
    names = sorted(set().union(*(run.config for run in runs)))
    rows = [(name, [run.config.get(name) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


class _Clock:
    """Hours of computing at a moment: the pauses between the processes of a run do not count."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self._starts = [event["time"] for event in events if event.get("event") == "start"]
        self._before = self._at = 0.0
        self._segment = -1

    def __call__(self, moment: float | None) -> float | None:
        if moment is None or not self._starts:
            return None
        while self._segment + 1 < len(self._starts) and self._starts[self._segment + 1] <= moment:
            self._segment += 1
            self._before = self._at
        self._at = self._before + (moment - self._starts[max(self._segment, 0)]) / 3600
        return self._at


def _append(series: dict[str, list[Any]], axes: dict[str, Any], y: float) -> None:
    for axis in _AXES:
        series.setdefault(axis, []).append(axes[axis])
    series.setdefault("y", []).append(y if math.isfinite(y) else None)


def _health(record: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of each spiking layer, and the gradient norm of each weight layer."""
    names = [key[len("spikes/") : -len("/firing_rate_t")] for key in record if key.endswith("/firing_rate_t")]
    if not names:
        return None
    layers = {
        name: {
            "firing_rate_t": record[f"spikes/{name}/firing_rate_t"],
            **{metric: record.get(f"{prefix}{name}/{metric}") for metric, prefix in _LAYER_METRICS.items()},
        }
        for name in names
    }
    gradients = {
        key[len("gradient_norm/") :]: _number(value)
        for key, value in record.items()
        if key.startswith("gradient_norm/")
    }
    return {"step": record.get("step"), "layers": layers, "gradients": gradients}


def _is_per_layer(key: str) -> bool:
    return key.startswith(("membrane/", "gradient_norm/")) or (
        key.startswith("spikes/") and key.count("/") > 1
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``a.b.c`` → value."""
    if not isinstance(value, dict):
        return {prefix[:-1]: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}."))
    return flat
