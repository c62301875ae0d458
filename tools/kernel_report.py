"""Registers, spills and bytes moved of every kernel, written into docs/kernels.md: ``make kernel-report``.

Compiles with nvcc for sm_80, sm_90, sm_100 and sm_120; no GPU is needed. The table stands between two
markers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scalesnn.kernels.source import surrogate_key, symbol, variant_source  # noqa: E402
from scalesnn.surrogate import ATan  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
VARIANTS = [  # name, charge, hard reset, detached reset, parametric
    ("IF, hard reset", 1, True, False, False),
    ("LIF, soft reset, detached", 2, False, True, False),
    ("PLIF, hard reset", 2, True, False, True),
]
# Tensors [T, N, C, H, W] that each kernel reads and writes, in elements a neuron-step, and in bits; and the
# least possible.
TRAFFIC = {
    "statistics": (1, 0, 1),
    "forward": (2, 1, 2),
    "backward": (4, 0, 3),
    "normalise_backward": (3, 0, 3),
}
REASONS = {
    "statistics": "reads x",
    "forward": "reads x; writes spikes, and bits",
    "backward": "reads x twice (then mostly from cache) and the spikes' gradient; writes y's",
    "normalise_backward": "reads x and y's gradient; writes x's",
}


def compile_report(code: str, architecture: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and stack bytes of each kernel of a module."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "neuron.cu"
        source.write_text(code, encoding="utf-8")
        command = ["nvcc", "-cubin", f"-arch={architecture}", "-std=c++17", "--fmad=false", "-Xptxas", "-v"]
        command += [str(source), "-o", str(Path(folder) / "neuron.cubin")]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, output, re.DOTALL)
    return {
        name.removeprefix(symbol("")): (int(n), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, n in found
    }


def resources() -> list[str]:
    """The table of registers and spills."""
    key = surrogate_key(ATan.kernel_expression or "", ("alpha",))
    lines = [
        "| kernel | input, steps | " + " | ".join(ARCHITECTURES) + " |",
        "| --- | --- | " + " | ".join("---" for _ in ARCHITECTURES) + " |",
    ]
    for name, *rest in VARIANTS:
        for dtype, steps in ((torch.float32, 8), (torch.float32, 32), (torch.bfloat16, 32)):
            rows: dict[str, list[str]] = {}
            for architecture in ARCHITECTURES:
                modules = [variant_source(dtype, key, steps, *rest, True)]
                if steps == 8 or dtype == torch.bfloat16:
                    modules.append(variant_source(dtype, None, 1, *rest, True))
                for code in modules:
                    for kernel, (registers, spills, stack) in compile_report(code, architecture).items():
                        if kernel in ("forward", "backward"):
                            text = f"{registers} registers, {spills} B spilled, {stack} B stack"
                            rows.setdefault(kernel, []).append(text)
            for kernel, cells in rows.items():
                what = str(dtype).removeprefix("torch.") + (f", T ≤ {steps}" if kernel == "backward" else "")
                lines.append(f"| {kernel}, {name} | {what} | " + " | ".join(cells) + " |")
    return lines


def traffic() -> list[str]:
    """The table of bytes moved per neuron and time-step."""
    lines = ["| kernel | float32 | bfloat16 | least possible (float32) | |", "|" + " --- |" * 5]
    totals = [0.0, 0.0, 0.0]
    for kernel, (elements, bits, least) in TRAFFIC.items():
        values = [elements * 4 + bits / 8, elements * 2 + bits / 8, least * 4 + bits / 8]
        totals = [total + value for total, value in zip(totals, values, strict=True)]
        cells = " | ".join(f"{value:.3f} B" for value in values)
        lines.append(f"| {kernel} | {cells} | {REASONS[kernel]} |")
    cells = " | ".join(f"{total:.3f} B" for total in totals)
    return [*lines, f"| BN + neuron, a training step | {cells} | |"]


def main() -> int:
    """Write the tables."""
    if shutil.which("nvcc") is None:
        print("kernel-report: nvcc is not on PATH; docs/kernels.md is left as it is")
        return 1
    page = ROOT / "docs" / "kernels.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split("<!-- kernel-report -->", 1)
    _, after = rest.split("<!-- end of kernel-report -->", 1)
    heading = "Bytes moved per neuron and time-step, beside what is small (v, coefficients):"
    tables = "\n".join([*resources(), "", heading, "", *traffic()])
    marked = f"<!-- kernel-report -->\n{tables}\n<!-- end of kernel-report -->"
    page.write_text(before + marked + after, encoding="utf-8")
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
