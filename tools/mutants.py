"""Mutation test of the kernels' sources: ``make mutants``. Not in CI: some two hours of two cores.

Each arithmetic operator, comparison, assignment operator and small index of neuron*.cu, neuron_cpu.cpp and
spike_conv.cpp is changed in turn, and the kernel tests are run on the changed source (the neurons' on the
CPU's build and on the GPU's); a mutant that they do not notice survives. Survivors that cannot be noticed are
explained in tools/mutants_explained.yaml. A run that was broken off goes on where it was. Results:
benchmarks/results/mutants.json.

    python tools/mutants.py [--every N] [--jobs J] [--only-survivors]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = ROOT / "tests" / "kernels"
sys.path[:0] = [str(ROOT), str(KERNEL_TESTS)]
KERNELS = ROOT / "scalesnn" / "kernels"
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
EXPLAINED = Path(__file__).with_name("mutants_explained.yaml")
UNIT, SPIKES, MODELS, CONV, MEMORY, GEOMETRY = (
    KERNEL_TESTS / f"test_{name}.py"
    for name in ("unit_op", "spike_ops", "fused_models", "spike_conv", "memory_checker", "gpu_geometry")
)
NEURON_STAGES = [  # tests and their names; the first stage notices most, and is fast
    ([UNIT], "(batch_norm_unit_and_gradients and shape0) or (equal_the_oracle and 70)"),
    ([GEOMETRY], ""),
    ([SPIKES, UNIT], "not opcheck and not (equal_the_oracle and 70)"),
    ([SPIKES, MODELS], "opcheck or test_fused"),
    ([MEMORY], "stay_within"),
]
STAGES = {
    "neuron.cu": NEURON_STAGES,
    "neuron_gpu.cu": NEURON_STAGES,
    "neuron_cpu.cpp": NEURON_STAGES,
    "spike_conv.cpp": [([CONV], ""), ([MEMORY], "stay_within")],
}
SECONDS = 180.0  # a mutant that takes longer hangs, which is noticed
NOTICED, SURVIVED, INVALID = "noticed", "survived", "does not compile"
EXIT = {NOTICED: 1, SURVIVED: 0, INVALID: 77}
CHANGES = [
    (r"(?<=[\w\])]) \+ (?=[\w(])", " - "),
    (r"(?<=[\w\])]) - (?=[\w(])", " + "),
    (r"(?<=[\w\])]) \* (?=[\w(])", " + "),
    (r"(?<=[\w\])]) / (?=[\w(])", " * "),
    (r"(?<=[\w\])]) % (?=[\w(])", " / "),
    (r" \+= ", " -= "),
    (r" -= ", " += "),
    (r" \*= ", " += "),
    (r" >= ", " > "),
    (r" < ", " <= "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" && ", " || "),
    (r"\[([012])\]", "[3 - \\1 > 2 ? 1 : 0]"),
    (r" >> ", " << "),
    (r" << ", " >> "),
    (r"real\(0\) : real\(1\)", "real(1) : real(0)"),
    (r"real\(1\) : real\(0\)", "real(0) : real(1)"),
]


@dataclass(frozen=True)
class Mutant:
    """One change of a source: which, on which line, what the line is then, and the whole text."""

    source: str
    line: int
    changed: str
    text: str

    @property
    def key(self) -> str:
        """What names it, and the tests it meets, in the record of a run."""
        return hashlib.sha256(self.text.encode() + tests_of(self.source)).hexdigest()[:16]


@cache
def tests_of(source: str) -> bytes:
    """The text of the tests that the mutants of a source meet."""
    files = {file for files, _ in STAGES[source] for file in files}
    helpers = ("conftest.py", "gpu_on_cpu.py", "oracle.py", "variants.py", "cuda_shim.h")
    files |= {KERNEL_TESTS / name for name in helpers}
    return b"".join(file.read_bytes() for file in sorted(files))


def mutants(source: str) -> list[Mutant]:
    """All of a file's; macros, templates' heads and kernels' signatures are left alone."""
    lines = (KERNELS / source).read_text(encoding="utf-8").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(("// ----", "struct Convolution")))
    found = []
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if number < start or line.lstrip().startswith(("#", "//", "template", "asm")) or "__global__" in line:
            continue
        for pattern, replacement in CHANGES:
            for match in re.finditer(pattern, code):
                changed = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                mutant = "\n".join([*lines[:number], changed, *lines[number + 1 :]])
                found.append(Mutant(source, number + 1, changed.strip(), mutant))
    return list({mutant.key: mutant for mutant in found}.values())


def build_quickly(code: str, path: Path, flags: tuple[str, ...]) -> None:
    """In the place of ``build._build``: no torch, less optimisation."""
    source = path.with_suffix(".cpp")
    source.write_text(code, encoding="utf-8")
    quick = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp"]
    command = ["g++", *quick, "-shared", "-fPIC", "-w", str(source), "-o", f"{path}.new"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    os.replace(f"{path}.new", path)


def compiles(source: str) -> bool:
    """Whether the changed source compiles; the neurons' in both builds, with a surrogate and without."""
    from gpu_on_cpu import compile_shim
    from oracle import ATAN
    from variants import unit_variant

    from scalesnn.kernels import cpu, spike_conv
    from scalesnn.kernels.source import variant_source

    try:
        if source == "spike_conv.cpp":
            spike_conv.library()
            return True
        cpu.library(None)
        cpu.library(ATAN)
        for kernel in ("forward", "backward", "statistics"):
            compile_shim(variant_source(*unit_variant(kernel, torch.float32, 4)), cpu.cache_folder())
    except subprocess.CalledProcessError:
        return False
    return True


def examine(mutant: Mutant, folder: Path) -> int:
    """Run the tests on a mutant, in a process of its own; the exit code says how it went."""
    from scalesnn.kernels import build, spike_conv

    changed = folder / mutant.source
    changed.write_text(mutant.text, encoding="utf-8")
    os.environ["SCALESNN_CACHE"] = str(folder)
    if mutant.source != "spike_conv.cpp":
        os.environ["SCALESNN_KERNEL_SOURCE"] = str(folder)
    else:
        spike_conv.SOURCE = changed
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    build._build = build_quickly
    if not compiles(mutant.source):
        return EXIT[INVALID]
    for number, (files, names) in enumerate(STAGES[mutant.source]):
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
        options += [f"--basetemp={folder / f'stage{number}'}", f"--rootdir={ROOT}"]
        if pytest.main([*options, *map(str, files), *(["-k", names] if names else [])]) != 0:
            return EXIT[NOTICED]
    return EXIT[SURVIVED]


def run_all(chosen: list[Mutant], jobs: int, record: Path) -> dict[str, str]:
    """Outcome of every mutant by its key, written to ``record`` as they come.

    Processes are forked from this one, which has imported torch but not yet used it.
    """
    done: dict[str, str] = {}
    if record.exists():
        done = dict(json.loads(line) for line in record.read_text(encoding="utf-8").splitlines())
    waiting = [mutant for mutant in chosen if mutant.key not in done]
    running: dict[int, tuple[Mutant, float, tempfile.TemporaryDirectory[str]]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, folder = waiting.pop(0), tempfile.TemporaryDirectory(prefix="mutant-")
            process = os.fork()
            if process == 0:
                os.setsid()
                code = EXIT[NOTICED]
                try:
                    code = examine(mutant, Path(folder.name))
                finally:
                    os._exit(code)
            running[process] = (mutant, time.monotonic(), folder)
        time.sleep(0.1)
        for process, (mutant, start, folder) in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended and time.monotonic() - start > SECONDS:
                os.killpg(process, signal.SIGKILL)
                ended, status = os.waitpid(process, 0)
            if not ended:
                continue
            code = os.waitstatus_to_exitcode(status)
            outcome = next((name for name, value in EXIT.items() if value == code), NOTICED)
            done[mutant.key] = outcome
            with open(record, "a", encoding="utf-8") as file:
                file.write(json.dumps([mutant.key, outcome]) + "\n")
            if outcome == SURVIVED:
                print(f"survived: {mutant.source}:{mutant.line}: {mutant.changed}", flush=True)
            folder.cleanup()
            del running[process]
    return {mutant.key: done[mutant.key] for mutant in chosen}


def survivors_among(outcomes: dict[str, str], chosen: list[Mutant]) -> list[dict[str, Any]]:
    """Those that survived, in the order of the source, with the reasons that are known."""
    reasons: dict[str, str] = yaml.safe_load(EXPLAINED.read_text(encoding="utf-8")) or {}
    return [
        {
            "source": m.source,
            "line": m.line,
            "changed to": m.changed,
            "why": reasons.get(m.changed, "not explained"),
        }
        for m in sorted(chosen, key=lambda m: (m.source, m.line))
        if outcomes[m.key] == SURVIVED
    ]


def main() -> int:
    """Run the mutants and write what survived; 0 where at least 95 % were noticed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take each N-th mutant, of a shuffled list")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument(
        "--only-survivors", action="store_true", help="those of the last results, after tests were added"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    every = [mutant for source in STAGES for mutant in mutants(source)]
    random.Random(0).shuffle(every)
    chosen = every[:: args.every]
    counts: dict[str, int] = dict.fromkeys(EXIT, 0)
    result: dict[str, Any] = {"mutants": len(every), "run": len(chosen)}
    if args.only_survivors:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
        counts |= {name: result[name] for name in counts} | {SURVIVED: 0}
        known = {(row["source"], row["line"], row["changed to"]) for row in result["survivors"]}
        chosen = [mutant for mutant in every if (mutant.source, mutant.line, mutant.changed) in known]
    outcomes = run_all(chosen, args.jobs or 1, Path(tempfile.gettempdir()) / "scalesnn-mutants.jsonl")
    for outcome in outcomes.values():
        counts[outcome] += 1
    share = counts[NOTICED] / max(counts[NOTICED] + counts[SURVIVED], 1)
    print(
        f"{counts} of {result['run']}; {share:.1%} of those that compile are noticed; "
        f"{len(every)} are possible"
    )
    result |= {**counts, "share": share, "survivors": survivors_among(outcomes, chosen)}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
