"""How fast the kernels can be, read from their machine code, into docs/kernels.md: ``make kernel-report``.

Compiles every variant for sm_80, sm_90, sm_100 and sm_120 with NVRTC and disassembles it; no GPU is needed.
The model: speed_model.py. The predictions also go to benchmarks/results/kernel_report.json, with which
``make gpu-check`` compares what it measures. The tables stand between two markers.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests" / "kernels")]

from sass import Kernel, Loop, kernel_of, nvrtc_compile  # noqa: E402
from speed_model import DEVICES, Device, Prediction, hot_loop, predict  # noqa: E402
from variants import unit_variant  # noqa: E402

from scalesnn.kernels.source import Variant, variant_source  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kernel_report.json"
TRAFFIC = {  # elements that a neuron-step reads and writes, and bits that it writes
    "statistics": (1, 0, 0),
    "forward": (1, 1, 1),
    "backward": (2, 1, 0),
    "normalise_backward": (2, 1, 0),
}
REASONS = {
    "statistics": "reads x",
    "forward": "reads x; writes spikes, and bits",
    "backward": "reads x and the spikes' gradient; writes y's",
    "normalise_backward": "reads x and y's gradient; writes x's",
}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
STEPS = (4, 8, 16)
NEURONS: dict[str, dict[str, Any]] = {
    "IF, hard reset": {"charge": 1},
    "IF, soft reset": {"charge": 1, "hard_reset": False},
    "LIF, tau = 1.7, v_reset = -0.1": {"tau": 1.7, "v_reset": -0.1},
    "LIF, soft reset, detached": {"hard_reset": False, "detach_reset": 1},
    "PLIF, hard reset": {"decay": 1 << 20},
}


@cache
def kernel(variant: Variant, architecture: str) -> Kernel:
    """The machine code of a variant."""
    return kernel_of(nvrtc_compile(variant_source(*variant), architecture))


def traffic(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of a neuron-step, and those of them that are read."""
    reads, writes, bits = TRAFFIC[name]
    return (reads + writes) * dtype.itemsize + bits / 8, float(reads * dtype.itemsize)


def prediction(variant: Variant, steps: int, device: Device) -> Prediction:
    """What the model says of a variant that is launched for ``steps`` time-steps."""
    code = kernel(variant, device.architecture)

    def trips(_: Loop) -> float:  # the loop over chunks of steps, where there are several
        return steps / variant.steps

    path = code.path(hot_loop(code), trips)
    return predict(code, path, device, steps * variant.lanes, *traffic(variant.kernel, variant.dtype))


def speeds(rows: list[dict[str, Any]]) -> list[str]:
    """The table of predictions; adds to ``rows`` what it is made of."""
    names = " | ".join(f"{device.name}, {device.architecture}" for device in DEVICES)
    lines = [f"| kernel | layout | x | T | a load | {names} |", "| " + "--- | " * (5 + len(DEVICES))]
    for name, last, dtype, steps in itertools.product(TRAFFIC, (True, False), DTYPES, STEPS):
        variant = unit_variant(name, dtype, steps, channels_last=last)
        cells = []
        for device in DEVICES:
            found = prediction(variant, steps, device)
            spills = f", **{found.spills} spills**" if found.spills else ""
            share = f"{found.share:.0%}" + (f" ({found.limit})" if found.limit else "")
            cells.append(
                f"{share}; {found.instructions:.0f} instr, {found.in_flight / 1024:.0f} KB, "
                f"{found.registers} reg × {found.threads}{spills}"
            )
            rows.append(
                {"kernel": name, "channels_last": last, "dtype": DTYPES[dtype], "T": steps}
                | {"gpu": device.name, "lanes": variant.lanes, "bytes": traffic(name, dtype)[0]}
                | asdict(found)
            )
        layout = "channels_last" if last else "contiguous"
        load = f"{variant.lanes} × {dtype.itemsize} B"
        lines.append(
            f"| {name} | {layout} | {DTYPES[dtype]} | {steps} | {load} | " + " | ".join(cells) + " |"
        )
    return lines


def neurons() -> list[str]:
    """The table of registers, spills and instructions of other neurons, and of long sequences."""
    names = " | ".join(device.architecture for device in DEVICES)
    lines = [f"| neuron | x | T | kernel | {names} |", "| " + "--- | " * (4 + len(DEVICES))]
    for neuron, dtype, steps in itertools.product(NEURONS, DTYPES, (16, 32)):
        for name in ("forward", "backward"):
            variant = unit_variant(name, dtype, steps, **NEURONS[neuron])
            cells = []
            for device in DEVICES:
                code = kernel(variant, device.architecture)
                spills = f", **{code.spills} spills**" if code.spills else ""
                count = (
                    ""
                    if steps > variant.steps or steps > 16
                    else (f", {prediction(variant, steps, device).instructions:.0f} instr")
                )
                cells.append(f"{code.registers} reg{count}{spills}")
            lines.append(f"| {neuron} | {DTYPES[dtype]} | {steps} | {name} | " + " | ".join(cells) + " |")
    return lines


def bytes_moved() -> list[str]:
    """The table of bytes moved per neuron and time-step."""
    lines = ["| kernel | float32 | bfloat16 | |", "|" + " --- |" * 4]
    totals = dict.fromkeys(DTYPES, 0.0)
    for name, reason in REASONS.items():
        for dtype in DTYPES:
            totals[dtype] += traffic(name, dtype)[0]
        cells = " | ".join(f"{traffic(name, dtype)[0]:.3f} B" for dtype in DTYPES)
        lines.append(f"| {name} | {cells} | {reason} |")
    cells = " | ".join(f"{total:.3f} B" for total in totals.values())
    return [*lines, f"| BN + neuron, a training step | {cells} | |"]


def main() -> int:
    """Write the tables."""
    rows: list[dict[str, Any]] = []
    needed = ", ".join(f"{device.in_flight / 1024:.0f} KB ({device.name})" for device in DEVICES)
    parts = [
        "Predicted share of the memory's bandwidth (LIF, tau = 2, hard reset to 0, ATan; in brackets what "
        "limits it); instructions per neuron-step; bytes in flight per SM; registers × resident threads. "
        f"Needed in flight: {needed}.",
        "\n".join(speeds(rows)),
        "Other neurons (channels_last):",
        "\n".join(neurons()),
        "Bytes moved per neuron and time-step, beside what is small (v, coefficients):",
        "\n".join(bytes_moved()),
    ]
    tables = "\n\n".join(parts)
    page = ROOT / "docs" / "kernels.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- kernel-report -->", 1)
    _, after = rest.split("<!-- end of kernel-report -->", 1)
    marked = f"<!-- kernel-report -->\n{tables}\n<!-- end of kernel-report -->"
    page.write_text(before + marked + after, encoding="utf-8")
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
