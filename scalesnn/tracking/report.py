"""``scalesnn report RUN [RUN …]``: one page that tells a run's story, or compares several; it opens without
a network.

The page is one HTML file with its data, style and script inside; the same curves stand beside it as PNG
files.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import time
from pathlib import Path
from typing import Any

from scalesnn.base import UserError
from scalesnn.tracking.console import duration
from scalesnn.tracking.records import strict_json
from scalesnn.tracking.reference import Reference, load_reference
from scalesnn.tracking.report_data import RunData, config_differences, curve_of, load_run
from scalesnn.tracking.report_pictures import write_pictures

__all__ = ["add_report_command", "write_report"]

_ASSETS = Path(__file__).with_name("report_assets")
_PHASES = ("data_wait_s", "time/forward_s", "time/backward_s", "time/communication_s", "time/optimizer_s")
_MOST_EVENTS = 200


def add_report_command(commands: Any) -> None:
    """Add ``report`` to the commands of ``scalesnn``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="one HTML page of a run, or of several side by side, that opens offline; and PNGs",
        description="Write report.html (self-contained) and PNG files of one run, or several side by side.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (it has metrics.jsonl)")
    add(
        "--reference",
        metavar="NAME|FILE",
        help="a published run to compare with, such as sew_resnet34 (default: the first run's --reference)",
    )
    add("-o", "--output", type=Path, help="folder to write to (default: report in the first run's folder)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    output = args.output or args.runs[0] / "report"
    page = write_report(args.runs, output, args.reference)
    runs = [load_run(folder) for folder in args.runs]
    reference = reference_of(runs, args.reference)
    if reference is not None:
        for run in runs:
            print(f"scalesnn: {run.name} against {reference.name}: {verdict(run, reference)}")
    print(f"scalesnn: {page} and {len(list(output.glob('*.png')))} pictures beside it")
    return 0


def write_report(folders: list[Path], output: Path, reference: str | None = None) -> Path:
    """Write report.html and the PNG files of the runs in ``folders`` into ``output``; returns the page's
    path.

    Args:
        reference: name or file of a published run, whose curve is drawn beside theirs; None: the first run's
            ``--reference``, if it had one.

    Raises:
        UserError: a folder is not a run's, there is no such reference, or the output cannot be written.
    """
    runs = [load_run(folder) for folder in folders]
    expected = reference_of(runs, reference)
    try:
        output.mkdir(parents=True, exist_ok=True)
        page = output / "report.html"
        page.write_text(_page(runs, expected), encoding="utf-8")
        write_pictures([*runs, *([] if expected is None else [curve_of(expected, runs[0])])], output)
    except OSError as error:
        raise UserError(f"cannot write the report to {output}: {error}") from None
    return page


def reference_of(runs: list[RunData], name: str | None) -> Reference | None:
    """The reference that is asked for, else that of the first run's settings if it is still there.

    Raises:
        UserError: the one that is asked for is none.
    """
    if name is not None:
        return load_reference(name)
    try:
        return load_reference(str(own)) if (own := runs[0].setting("reference")) else None
    except UserError:
        return None


def verdict(run: RunData, reference: Reference) -> str:
    """Whether a run is on track, since when, and how it differs from the reference."""
    series = run.series.get("test:acc1", {"epoch": [], "y": []})
    pairs = zip(series["epoch"], series["y"], strict=True)
    text = reference.verdict([(e + 1, y) for e, y in pairs if e is not None and y is not None])
    settings = {name: run.setting(name) for name in reference.settings}
    if batch := run.setting("batch_size"):
        accumulation = run.setting("gradient_accumulation") or 1
        settings["global_batch"] = batch * (run.config.get("world_size") or 1) * accumulation
    others = reference.differences(settings)
    return text + (f" (the run has {', '.join(others)})" if others else "")


def _page(runs: list[RunData], reference: Reference | None = None) -> str:
    names = sorted(set().union(*(run.config for run in runs)))
    shorts = short_names([run.name for run in runs])
    shown = [_run_data(run, short) for run, short in zip(runs, shorts, strict=True)]
    columns, differences = list(runs), config_differences(runs) if len(runs) > 1 else []
    if reference is not None:
        curve = curve_of(reference, runs[0])
        epochs, best = list(reference.top1.items())[-1]
        facts = [("from", reference.source), (f"after {epochs} epochs", f"{best} %")]
        for data, run in zip(shown, runs, strict=True):
            data["facts"].append((f"against {reference.name}", verdict(run, reference)))
        shown.append({**_run_data(curve, "reference"), "facts": facts})
        columns.append(curve)
        own = {name for name, _ in differences} | set(curve.config)
        rows = [(name, [run.config.get(name) for run in columns]) for name in sorted(own)]
        differences = [(name, values) for name, values in rows if any(v != values[0] for v in values)]
    data = {
        "runs": shown,
        "differences": differences,
        "settings": [(name, [run.config.get(name) for run in columns]) for name in names],
    }
    text = json.dumps(strict_json(_as_lists(data)), ensure_ascii=False, separators=(",", ":"), default=str)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    for mark, value in {
        "@TITLE@": html.escape(title),
        "@MADE@": time.strftime("%Y-%m-%d %H:%M"),
        "@CSS@": (_ASSETS / "page.css").read_text(encoding="utf-8"),
        "@JS@": (_ASSETS / "page.js").read_text(encoding="utf-8"),
        "@DATA@": text.replace("<", "\\u003c"),  # nothing in the data can end the script element
    }.items():
        page = page.replace(mark, value)
    return page


def short_names(names: list[str]) -> list[str]:
    """Names short enough for a legend: what the names do not share, cut at 24 characters; numbered where
    equal.
    """
    if len(names) == 1:
        return [names[0][:24]]
    parts = [name.split("_") for name in names]
    common = set(parts[0]).intersection(*parts[1:])
    shorts = ["_".join(part for part in split if part not in common)[:24] or "run" for split in parts]
    return [
        short if shorts.count(short) == 1 else f"{short} {place + 1}" for place, short in enumerate(shorts)
    ]


def _run_data(run: RunData, short: str) -> dict[str, Any]:
    best = run.best("test:acc1")
    headline = {"value": f"{best:.2f} %", "label": "best test top-1"}
    if best is None:
        loss = run.last("loss")
        headline = {"value": "–" if loss is None else f"{loss:.4f}", "label": "last training loss"}
    return {
        "short": short,
        "label": run.name,
        "series": run.series,
        "health": run.health,
        "headline": headline,
        "facts": [(label, value) for label, value in _facts(run) if value is not None],
        "phases": _phases(run),
        "events": _events(run),
        "steps_per_epoch": _steps_per_epoch(run),
    }


def _facts(run: RunData) -> list[tuple[str, Any]]:
    ends = [event for event in run.events if event.get("event") in ("start", "end")]
    processes = sum(event.get("event") == "start" for event in run.events)
    state = "unknown" if not ends else "ended" if ends[-1]["event"] == "end" else "running, or cut off"
    steps = max((step for series in run.series.values() for step in series["step"] if step), default=0)
    hours = max((h for series in run.series.values() for h in series["hours"] if h is not None), default=None)
    ema = run.best("ema_test:acc1")
    memory, ratio = run.last("memory/peak_bytes"), run.last("energy/ann_over_snn")
    rates = run.values("images_per_s")
    rate = statistics.median(rates) if rates else None
    energy, used = run.last("energy/snn_mj_per_image"), run.last("device_hours")
    network = ", ".join(str(run.setting(name)) for name in ("model",) if run.setting(name))
    return [
        ("network", f"{network}, T = {run.setting('T')}" if network else None),
        ("state", f"{state}, {processes} process{'es' if processes != 1 else ''}"),
        ("steps", f"{steps:,}"),
        ("with averaged weights", None if ema is None else f"{ema:.2f} %"),
        ("images a second", None if rate is None else f"{rate:,.0f}"),
        ("computing time", None if hours is None else duration(hours * 3600)),
        ("device-hours", None if used is None else f"{used:.2f}"),
        ("peak memory", None if memory is None else f"{memory / 2**30:.2f} GiB"),
        ("energy an image", None if energy is None else f"{energy:.3g} mJ"),
        ("the same ANN", None if ratio is None else f"{ratio:.2f} × that"),
        ("alerts", sum(event.get("event") == "alert" for event in run.events)),
    ]


def _phases(run: RunData) -> dict[str, float] | None:
    steps = run.values("step_s")
    if not steps:
        return None
    means = {name: sum(values) / len(steps) for name in _PHASES if (values := run.values(name))}
    total = sum(steps) / len(steps)
    return {**means, "total": total, "other": max(0.0, total - sum(means.values()))}


def _events(run: RunData) -> list[tuple[str, Any, str, str]]:
    rows = []
    for event in run.events:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
        kind = str(event.get("event"))
        if kind == "start":
            text = f"resumed at step {event.get('first_step')}" if event.get("resumed") else "a new run"
        elif kind == "alert":
            text = f"{event.get('title')}: {event.get('text')}"
        elif kind == "notice":
            text = str(event.get("text"))
        else:
            continue
        rows.append((when, event.get("step"), kind, text))
    return rows[-_MOST_EVENTS:]


def _steps_per_epoch(run: RunData) -> float:
    """Steps of an epoch, from the epoch records; 1 where there is none."""
    series = run.series.get("train:loss")
    ends = [(e + 1, s) for e, s in zip(series["epoch"], series["step"], strict=True)] if series else []
    return max((step / epoch for epoch, step in ends if epoch and step), default=1.0)


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_lists(item) for item in value]
    return value
