"""Mutation test of the kernel source: ``make mutants``. Not in CI: about half a minute of a core for each.

Each arithmetic operator, comparison, assignment operator and small index of neuron.cu is changed in turn,
and the kernel tests are run on the changed source; a mutant that they do not notice survives. Results:
benchmarks/results/mutants.json.

    python tools/mutants.py [--every N] [--minutes M] [--jobs J]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "scalesnn" / "kernels" / "neuron.cu"
FIRST = ["tests/kernels/test_unit_op.py", "-k", "batch_norm_unit or bit_for_bit"]  # notice most, and fast
TESTS = [f"tests/kernels/test_{name}.py" for name in ("unit_op", "spike_ops", "fused_models")]
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


def mutants(text: str) -> list[tuple[int, str, str]]:
    """Line number, the changed line, and the whole changed source."""
    lines = text.split("\n")
    found = []
    start = next(i for i, line in enumerate(lines) if "numbers" in line and line.startswith("// ---"))
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if number < start or line.lstrip().startswith(("#", "//", "template", "asm")) or "__global__" in line:
            continue
        for pattern, replacement in CHANGES:
            for match in re.finditer(pattern, code):
                changed = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                mutant = "\n".join([*lines[:number], changed, *lines[number + 1 :]])
                found.append((number + 1, changed.strip(), mutant))
    return found


def survives(mutant: str, cache: str) -> bool:
    """Whether the tests pass with the changed source."""
    environment = {
        **os.environ,
        "SCALESNN_CACHE": cache,
        "SCALESNN_KERNEL_SOURCE": str(Path(cache) / "neuron.cu"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    (Path(cache) / "neuron.cu").write_text(mutant, encoding="utf-8")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=120"]
    for chosen in (FIRST, TESTS):
        try:
            run = subprocess.run(
                [*pytest, *chosen], cwd=ROOT, env=environment, capture_output=True, timeout=600
            )
        except subprocess.TimeoutExpired:
            return False
        if run.returncode != 0:
            return False
    return True


def main() -> int:
    """Run the mutants and write what survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take each N-th mutant, of a shuffled list")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--minutes", type=float, default=600, help="stop after this")
    args = parser.parse_args()
    every = mutants(SOURCE.read_text(encoding="utf-8"))
    random.Random(0).shuffle(every)
    chosen, survivors, done = every[:: args.every], [], 0
    start = time.monotonic()

    def run(mutant: tuple[int, str, str]) -> bool | None:
        if time.monotonic() - start > 60 * args.minutes:
            return None
        with tempfile.TemporaryDirectory() as cache:
            return survives(mutant[2], cache)

    with ThreadPoolExecutor(args.jobs) as pool:
        for (line, changed, _), alive in zip(chosen, pool.map(run, chosen), strict=True):
            done += alive is not None
            if alive:
                survivors.append({"line": line, "changed to": changed})
                print(f"survived: line {line}: {changed}", flush=True)
    killed = done - len(survivors)
    share = killed / max(done, 1)
    print(f"{killed} of {done} mutants noticed ({share:.1%}); {len(every)} are possible")
    record = {"mutants": len(every), "run": done, "noticed": killed, "survivors": survivors}
    results = ROOT / "benchmarks" / "results" / "mutants.json"
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
