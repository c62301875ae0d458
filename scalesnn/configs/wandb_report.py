"""A W&B report of a project's runs, laid out for spiking networks; prints its address.

    pip install wandb-workspaces
    python configs/wandb_report.py --project scalesnn --entity YOUR_TEAM

Sections: accuracy, speed and cost, spikes, gradients, energy. ``--dry-run`` only prints the layout.
    Per-layer panels select their metrics by pattern, so that they fit any network.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

__all__ = ["LAYOUT", "blocks", "main"]

# section → panels: (title, metrics, or one pattern "/…/", options of the panel)
LAYOUT: dict[str, list[tuple[str, list[str] | str, dict[str, Any]]]] = {
    "Accuracy": [
        ("Top-1, %", ["test_acc1", "train_acc1", "ema_test_acc1"], {}),
        ("Loss", ["test_loss", "train_loss"], {}),
        ("Loss of each step", ["train/loss"], {"smoothing_factor": 0.6}),
        ("Learning rate", ["train/lr"], {}),
    ],
    "Speed and cost": [
        ("Images a second", ["train/images_per_s", "train/compute_images_per_s"], {"range_y": (0, None)}),
        ("Where a step's time goes", "time/.*_s", {"plot_type": "stacked-area"}),
        ("Wait for data, s", ["train/data_wait_s"], {}),
        ("Model FLOP utilisation", ["train/mfu"], {}),
        ("Peak memory, bytes", ["memory/peak_bytes", "memory/reserved_bytes"], {"range_y": (0, None)}),
        ("Device-hours", ["train/device_hours"], {}),
    ],
    "Spikes": [
        ("Firing rate of the network", ["spikes/firing_rate"], {"range_y": (0, None)}),
        ("Dead and saturated channels", ["spikes/dead_share", "spikes/saturated_share"], {}),
        ("Firing rate of each layer", "spikes/.+/firing_rate", {}),
        ("Dead channels of each layer", "spikes/.+/dead_share", {}),
        ("Firing rate at each time-step", "spikes/.+/firing_rate_t/t[0-9]+", {}),
        ("Share of membranes that pass gradient", "membrane/.+/active_share", {}),
    ],
    "Gradients": [("Gradient norm of each layer", "gradient_norm/.+", {"log_y": True})],
    "Energy": [
        ("Energy an image, mJ", ["energy/snn_mj_per_image", "energy/ann_mj_per_image"], {}),
        ("Synaptic operations an image", ["energy/synops_per_image"], {}),
    ],
}


def blocks(reports: Any, project: str, entity: str | None) -> list[Any]:
    """The report's blocks, made with ``wandb_workspaces.reports.v2``."""
    made: list[Any] = [reports.TableOfContents()]
    for section, panels in LAYOUT.items():
        lines = []
        for place, (title, metrics, options) in enumerate(panels):
            which = {"y": metrics} if isinstance(metrics, list) else {"metric_regex": metrics}
            layout = reports.Layout(x=8 * (place % 3), y=6 * (place // 3), w=8, h=6)
            lines.append(reports.LinePlot(title=title, x="step", layout=layout, **which, **options))
        runs = reports.Runset(project=project, entity=entity or "")
        made += [reports.H2(section), reports.PanelGrid(runsets=[runs], panels=lines)]
    return made


def main(arguments: list[str] | None = None) -> int:
    """Make the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--project", default="scalesnn")
    parser.add_argument("--entity", default=None, help="W&B team or user (default: yours)")
    parser.add_argument("--title", default="Spiking networks: accuracy, cost, health")
    parser.add_argument("--dry-run", action="store_true", help="print the layout only")
    args = parser.parse_args(arguments)
    if args.dry_run:
        for section, panels in LAYOUT.items():
            print(section)
            for title, metrics, _ in panels:
                print(f"    {title}: {metrics if isinstance(metrics, str) else ', '.join(metrics)}")
        return 0
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError:
        print("scalesnn: this needs W&B's report package: pip install wandb-workspaces", file=sys.stderr)
        return 2
    report = reports.Report(project=args.project, entity=args.entity or "", title=args.title, width="fluid")
    report.blocks = blocks(reports, args.project, args.entity)
    report.save()
    print(report.url)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
