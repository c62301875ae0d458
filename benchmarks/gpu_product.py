"""The product itself on a GPU, a part of gpu_check.py: what a user types, and what comes of it.

    python benchmarks/gpu_product.py --rehearse      the same commands on the CPU, with fewer steps

Trainings of the shipped images through the Trainer: losses of 20 steps with both loaders beside the CPU's; an
evaluation twice, equal bit for bit; both memory formats, host time beside GPU time; the largest T that fits;
steps with --compile and --cuda-graph beside plain ones;
with two GPUs or more, DDP, ZeRO-2, ZeRO-3 and FSDP2 through torchrun. What a missing package forbids is left
out, and each result is written as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import nn  # noqa: E402

SETTINGS = [
    *(
        "--model=spiking_resnet18",
        "--T=4",
        "--batch-size=32",
        "--lr=0.05",
        "--lr-warmup-epochs=0",
        "--seed=1",
    ),
    *(
        "--train-crop-size=28",
        "--val-resize-size=28",
        "--val-crop-size=28",
        "--auto-augment=none",
        "--workers=2",
    ),
    *("--random-erase=0", "--mixup-alpha=0", "--cutmix-alpha=0", "--metrics-every=1", "--wandb=disabled"),
]
STRATEGIES = {
    "ddp": ["--strategy=ddp"],
    "zero2": ["--deepspeed_config=configs/zero2.json"],
    "zero3": ["--deepspeed_config=configs/zero3.json"],
    "fsdp": ["--fsdp-config=configs/fsdp.yaml"],
}
FIRST_LOSS, MEAN_LOSS = 5e-3, 0.1  # float32: the first step's loss, relative; the mean of all, absolute


class Failures(list[str]):
    """What went wrong; printed at once."""

    def check(self, right: bool, text: str) -> None:
        """Note ``text`` where something is not right."""
        if not right:
            self.append(text)
            print(f"  WRONG: {text}")


def train(folder: Path, name: str, *flags: str, ranks: int = 1, timeout: float = 240) -> dict[str, Any]:
    """Run the Trainer of this file; its losses by step, its evaluations, its seconds, or its error.

    Args:
        folder: where runs go.
        name: of the run.
        flags: besides SETTINGS.
        ranks: processes, through torchrun where more than one.
        timeout: seconds.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    words = [*SETTINGS, f"--output-dir={folder}", f"--run-name={name}", *flags]
    begin = time.monotonic()
    line = [sys.executable, *launcher, str(ROOT / "benchmarks" / "gpu_product.py"), "train", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EVALUATIONS": str(folder / f"{name}.json")}
    try:
        run = subprocess.run(
            line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    if run.returncode:
        said = (run.stderr.strip() or run.stdout.strip()).splitlines()
        return {**found, "error": f"exit code {run.returncode}: {said[-1] if said else ''}"}
    lines = [json.loads(text) for text in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in lines if record.get("kind") == "step"]
    found["losses"] = [record["loss"] for record in steps]
    found["images_per_s"] = steps[-1].get("images_per_s")
    found["phases_s"] = {k: v for k, v in steps[-1].items() if k.startswith("time/") or k == "data_wait_s"}
    found["notices"] = [text for text in run.stderr.splitlines() if "scalesnn" in text or "WARNING" in text][
        :5
    ]
    found["evaluations"] = json.loads((folder / f"{name}.json").read_text())
    return found


def losses_and_evaluation(
    rows: dict[str, Any], wrong: Failures, folder: Path, device: str, steps: int
) -> None:
    """Trainer steps in float32 with both loaders, beside the CPU's losses; each evaluation twice."""
    for loader in ("dali", "torchvision"):
        try:
            if loader == "dali":
                import nvidia.dali  # noqa: F401
        except Exception as error:
            rows[loader] = f"left out: {error}"
            continue
        common = [f"--loader={loader}", f"--max-steps={steps}", "--disable-amp"]
        ours = train(folder, f"{loader}-{device}", f"--device={device}", *common)
        cpu = train(folder, f"{loader}-cpu-reference", "--device=cpu", *common)
        rows[loader] = {device: ours, "cpu reference": cpu}
        for run in (ours, cpu):
            wrong.check("error" not in run, f"{loader}: {run.get('error')}")
        if "error" in ours or "error" in cpu:
            continue
        first = abs(ours["losses"][0] - cpu["losses"][0]) / abs(cpu["losses"][0])
        mean = abs(sum(ours["losses"]) - sum(cpu["losses"])) / steps
        wrong.check(first < FIRST_LOSS, f"{loader}: the first loss is {first:.1e} away from the CPU's")
        wrong.check(mean < MEAN_LOSS, f"{loader}: the mean loss is {mean:.2f} away from the CPU's")
        pairs = ours["evaluations"]
        wrong.check(
            bool(pairs) and all(a == b for a, b in pairs), f"{loader}: two evaluations differ: {pairs}"
        )
        print(
            f"  {loader}: first loss {first:.1e} from the CPU's, mean {mean:.3f}, "
            f"{ours['images_per_s']:.0f} images/s"
        )


def recorded_steps(rows: dict[str, Any], wrong: Failures, folder: Path, device: str, steps: int) -> None:
    """Trainer steps with --compile and --cuda-graph beside plain ones: the losses, and images/s.

    On the CPU only that --cuda-graph is refused by name.
    """
    common = [f"--device={device}", "--loader=torchvision", f"--max-steps={steps}", "--disable-uda"]
    ways = {"plain": [], "cuda graph": ["--cuda-graph"], "compile": ["--compile"]}
    ways["compile, cuda graph"] = [*ways["compile"], *ways["cuda graph"]]
    if device == "cpu":
        refused = train(folder, "graph-refused", *common, *ways["cuda graph"])
        wrong.check("needs a GPU" in str(refused.get("error")), f"--cuda-graph on the CPU: {refused}")
        return
    for name, flags in ways.items():
        run = rows[name] = train(folder, f"recorded-{len(rows)}", *common, *flags)
        wrong.check("error" not in run, f"{name}: {run.get('error')}")
        if "error" in run or "error" in rows["plain"]:
            continue
        plain = rows["plain"]["losses"]
        first = abs(run["losses"][0] - plain[0]) / abs(plain[0])
        mean = abs(sum(run["losses"]) - sum(plain)) / steps
        wrong.check(first < 10 * FIRST_LOSS, f"{name}: the first loss is {first:.1e} away from the plain one")
        wrong.check(mean < MEAN_LOSS, f"{name}: the mean loss is {mean:.2f} away from the plain one")
        print(f"  {name}: mean loss {mean:.3f} from the plain one, {run['images_per_s']:.0f} images/s")


def several_gpus(rows: dict[str, Any], wrong: Failures, folder: Path, ranks: int, steps: int) -> None:
    """Every strategy through torchrun, in the precision of a user's first run."""
    for name, flags in STRATEGIES.items():
        if name.startswith("zero"):
            try:
                import deepspeed  # noqa: F401
            except Exception as error:
                rows[name] = f"left out: {error}"
                continue
        run = rows[name] = train(
            folder, name, *flags, f"--max-steps={steps}", "--loader=torchvision", ranks=ranks
        )
        wrong.check("error" not in run, f"{name} on {ranks} ranks: {run.get('error')}")
        if "error" not in run:
            wrong.check(
                run["losses"][-1] < 4, f"{name}: the loss is {run['losses'][-1]:.2f} after {steps} steps"
            )
            print(f"  {name} on {ranks} ranks: loss {run['losses'][-1]:.2f}, {run['images_per_s']:.0f} img/s")


def make_step(
    device: torch.device, T: int, size: int, batch: int, last: bool, policy: str
) -> Callable[[], None]:
    """A training step of spiking_resnet18 on random images."""
    from common import make_ours

    from scalesnn import functional
    from scalesnn.memory import apply_policy

    layout = torch.channels_last if last else torch.contiguous_format
    net = apply_policy(make_ours().to(device, memory_format=layout), policy)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    targets = torch.randint(0, 1000, (batch,), device=device)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(net(images.expand(T, *images.shape)).mean(0).float(), targets)
        loss.backward()
        functional.reset_net(net)

    return step


def formats(rows: dict[str, Any], device: torch.device, size: int, batch: int) -> None:
    """Seconds of a step in both memory formats: of the host until it has queued the step, and in all."""
    for last in (True, False):
        step = make_step(device, 4, size, batch, last, "none")
        host, whole = [], []
        for _ in range(5):
            begin = time.perf_counter()
            step()
            host.append(time.perf_counter() - begin)
            if device.type == "cuda":
                torch.cuda.synchronize()
            whole.append(time.perf_counter() - begin)
        name = "channels_last" if last else "contiguous"
        rows[name] = {"host_s": sorted(host)[2], "step_s": sorted(whole)[2]}
        print(f"  {name}: host {1000 * sorted(host)[2]:.1f} ms, step {1000 * sorted(whole)[2]:.1f} ms")


def largest_T(
    rows: dict[str, Any], device: torch.device, size: int, batch: int, most: int, until: float
) -> None:
    """The largest power of two that trains, under none and layer; until the time is up."""
    for policy in ("none", "layer"):
        T, rows[policy] = 4, 0
        while most >= T and time.monotonic() < until:
            try:
                make_step(device, T, size, batch, True, policy)()
            except torch.OutOfMemoryError:
                break
            rows[policy], T = T, 2 * T
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"  largest T under {policy}: {rows[policy]}")


def product(report: Any, device: torch.device, *, rehearse: bool = False) -> None:
    """Everything of this file; ``report`` is gpu_check.py's."""
    parts = ("losses", "formats", "largest_T", "recorded_steps", "several_gpus")
    rows: dict[str, Any] = {part: {} for part in parts}
    report.record["parts"]["product"] = rows
    wrong = Failures()
    steps, size, batch, most = (3, 32, 2, 8) if rehearse else (20, 224, 16, 1024)
    ranks = 2 if rehearse else min(torch.cuda.device_count(), 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measurements: list[Callable[[], None]] = [
            lambda: losses_and_evaluation(rows["losses"], wrong, folder, device.type, steps),
            lambda: formats(rows["formats"], device, size, batch),
            lambda: largest_T(rows["largest_T"], device, size, batch, most, time.monotonic() + 60),
            lambda: recorded_steps(rows["recorded_steps"], wrong, folder, device.type, steps),
        ]
        if ranks > 1:
            measurements.append(lambda: several_gpus(rows["several_gpus"], wrong, folder, ranks, steps))
        for measure in measurements:
            if report.out_of_time():
                break
            try:
                measure()
            except Exception as error:  # the others go on
                wrong.check(False, f"{type(error).__name__}: {error}")
            report.write()
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong, the first: {wrong[0]}")


def trainer() -> Any:
    """The product's Trainer, which evaluates twice and keeps what it found, bit for bit."""
    from scalesnn.model.train_imagenet_example import SResNetTrainer

    class Twice(SResNetTrainer):
        def evaluate(self, *given: Any, **named: Any) -> tuple[float, float, float]:
            """As always, twice."""
            found = [super(Twice, self).evaluate(*given, **named) for _ in range(2)]
            if self.topology.is_main:
                path = Path(os.environ["EVALUATIONS"])
                before = json.loads(path.read_text()) if path.exists() else []
                pair = [[float(value).hex() for value in values] for values in found]
                path.write_text(json.dumps([*before, pair]))
            return found[0]

    return Twice()


def main() -> int:
    """``train FLAGS``: the Trainer; ``--rehearse``: all of it on the CPU."""
    if sys.argv[1:2] == ["train"]:
        made = trainer()
        made.main(made.get_args_parser().parse_args(sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", required=True, help="on the CPU, with fewer steps")
    parser.parse_args()
    report = SimpleNamespace(record={"parts": {}}, out_of_time=lambda: False, write=lambda: None)
    product(report, torch.device("cpu"), rehearse=True)
    print(json.dumps(report.record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
