"""Everything to check on a machine with a GPU, in one command under 9 minutes: ``make gpu-check``.

    python benchmarks/gpu_check.py [--parts kernels,product,training,speed,memory,sanitizer] [--minutes 8]

Runs from the checkout, offline, under any Python >= 3.10 with torch >= 2.11 and CuPy; nothing is installed.
Parts are
independent: one that fails is reported and the others go on. Results are written as they come, to
benchmarks/results/gpu_check_<device>.json. Exit code: 0 all parts passed, 1 a part failed, 3 there is no GPU.

Another part is a function ``(report, device) -> None`` in PARTS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

PEAK_BYTES_PER_S = {
    "H100": 3.35e12,
    "H200": 4.8e12,
    "A100": 2.04e12,
    "B200": 8.0e12,
    "5090": 1.79e12,
    "4090": 1.01e12,
}


class Report:
    """Results so far; every change is on disk at once."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
        self.record: dict[str, Any] = {"missing": {}, "parts": {}}
        self.deadline = time.monotonic() + 60 * minutes

    def write(self, **values: Any) -> None:
        """Add to the record and save it."""
        self.record.update(values)
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def out_of_time(self) -> bool:
        """Whether what is left to measure must be left out."""
        return time.monotonic() > self.deadline

    def importable(self, module: str) -> bool:
        """Whether a module that a part needs is there; its absence is noted."""
        try:
            __import__(module)
        except Exception as error:  # a broken installation raises all kinds
            self.record["missing"][module] = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"  {module} cannot be imported: its measurements are left out")
            return False
        return True


def seconds(function: Callable[[], object], rounds: int = 10) -> float:
    """The median time of a call on the GPU."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return sorted(times)[len(times) // 2]


# ------------------------------------------------------------------------------------------ correctness
def kernels(report: Report, device: torch.device) -> None:
    """Every variant on the GPU against plain torch on the same GPU, and against the CPU's build."""
    from scalesnn import layer, neuron, surrogate

    nodes: list[tuple[str, Callable[..., nn.Module]]] = [
        ("IF", neuron.IFNode),
        ("LIF", neuron.LIFNode),
        ("LIF, input not decayed", lambda **k: neuron.LIFNode(decay_input=False, **k)),
        ("PLIF", neuron.ParametricLIFNode),
    ]
    failed, done, worst = [], 0, 0.0
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    every = itertools.product(nodes, (0.0, None), (False, True), dtypes, (4,), (False, True))
    long = itertools.product(nodes, (0.0, None), (False,), (torch.float32,), (1, 32, 70), (True,))
    for (name, make), v_reset, detach, dtype, T, last in itertools.chain(every, long):
        if report.out_of_time():
            break
        case = f"{name}, v_reset={v_reset}, detach_reset={detach}, {dtype}, T={T}, channels_last={last}"
        try:
            error = _compare(make, layer, surrogate, v_reset, detach, dtype, T, last, device)
            worst, done = max(worst, error), done + 1
            if error > (1e-4 if dtype == torch.float32 else 2e-2):
                failed.append(f"{case}: relative difference {error:.2e}")
        except Exception as error:
            failed.append(f"{case}: {type(error).__name__}: {error}")
    surrogates = [
        getattr(surrogate, n) for n in surrogate.__all__ if n not in ("heaviside", "SurrogateFunctionBase")
    ]
    for cls in surrogates:
        try:
            x = torch.randn(3, 2, 1000, device=device)
            grads = []
            for backend in ("cupy", "torch"):
                y = x.clone().requires_grad_()
                neuron.IFNode(step_mode="m", surrogate_function=cls(), backend=backend)(y).sum().backward()
                grads.append(y.grad)
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
            done += 1
        except Exception as error:
            failed.append(f"{cls.__name__}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    report.record["parts"]["kernels"] = {
        "cases": done,
        "largest relative difference": worst,
        "failed": failed,
    }
    print(f"  {done} cases, largest relative difference {worst:.1e}, {len(failed)} failed")
    if failed:
        raise AssertionError(f"{len(failed)} cases, the first: {failed[0]}")


def _compare(
    make: Callable[..., nn.Module],
    layer: Any,
    surrogate: Any,
    v_reset: float | None,
    detach: bool,
    dtype: torch.dtype,
    T: int,
    last: bool,
    device: torch.device,
) -> float:
    """The largest relative difference of spikes, v and gradients of a BN unit between CuPy and torch."""
    torch.manual_seed(T)
    x = torch.randn(T, 2, 37, 9, 5, device=device).to(dtype)
    if last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, 2))
    results = []
    for backend in ("cupy", "torch"):
        bn = layer.BatchNorm2d(37, step_mode="m").to(device)
        bn.backend = "torch" if backend == "torch" else "auto"
        kwargs = {"v_reset": v_reset, "detach_reset": detach, "surrogate_function": surrogate.ATan()}
        node = make(step_mode="m", backend=backend, **kwargs).to(device)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        wide = leaf if backend == "cupy" else leaf.float()  # the reference in float32 throughout
        spikes = bn(wide, neuron=node)
        (spikes.float() * torch.linspace(-1, 1, T, device=device).view(-1, 1, 1, 1, 1)).sum().backward()
        results.append([spikes.float(), node.v, leaf.grad.float(), bn.weight.grad, bn.running_var])
        results[-1] += [p.grad for p in node.parameters()]
    ours, theirs = results
    same = (ours[0] == theirs[0]).all(dim=0)  # a charge within rounding of the threshold may fire or not
    if same.double().mean() < 0.999:
        return 1.0 - float(same.double().mean())
    if not bool(same.all()):
        ours[1:3] = [ours[1] * same, ours[2] * same]
        theirs[1:3] = [theirs[1] * same, theirs[2] * same]
    pairs = [(a.detach(), b.detach()) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


# ------------------------------------------------------------------------------------------ speed
def _bandwidth(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAK_BYTES_PER_S.items() if key in name), None)


def _copy_bandwidth(device: torch.device) -> float:
    a = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a))


def speed(report: Report, device: torch.device) -> None:
    """The neuron alone and BN + neuron: CuPy, plain torch and SpikingJelly's Triton, in one run."""
    from scalesnn import layer, neuron, surrogate

    peer = report.importable("spikingjelly.activation_based.neuron")
    copy = _copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    part = {"copy_bytes_per_s": copy, "peak_bytes_per_s": _bandwidth(device), "rows": rows}
    report.record["parts"]["speed"] = part
    for dtype, T in itertools.product((torch.float32, torch.bfloat16), (4, 8, 16, 32)):
        if report.out_of_time():
            return
        x = torch.randn(T, 32 * 8 // T + 1, 64, 56, 56, device=device, dtype=dtype)
        size = x.element_size()
        # bytes that must move per neuron-step: forward x, spikes, bits; backward x, grad of spikes, grad of x
        floor = {"neuron": 5 * size + 1 / 8, "bn_neuron": 9 * size + 1 / 8}
        for kind in ("neuron", "bn_neuron"):
            row: dict[str, Any] = {"what": kind, "dtype": str(dtype), "T": T, "seconds": {}}
            for backend in ("cupy", "torch", *(("spikingjelly_triton",) if peer else ())):
                try:
                    step = _unit_step(kind, backend, x, layer, neuron, surrogate)
                    row["seconds"][backend] = seconds(step)
                    if (kind, backend) == ("bn_neuron", "cupy"):
                        row["kernels"] = against_model(
                            _kernel_seconds(step), x, torch.cuda.get_device_name(device), part
                        )
                except Exception as error:
                    row["seconds"][backend] = f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}"
                torch.cuda.empty_cache()
            ours = row["seconds"]["cupy"]
            if isinstance(ours, float):
                row["bytes_per_s"] = floor[kind] * x.numel() / ours
                row["of_copy_bandwidth"] = row["bytes_per_s"] / copy
            rows.append(row)
            report.write()
            print(f"  {kind:10} {str(dtype)[6:]:9} T={T:3} {row['seconds']}")
            for found in row.get("kernels", ()):
                share, predicted = found["measured_share"], found["predicted_share"]
                print(f"    {found['kernel']:20} {share:.0%} of the bandwidth, predicted {predicted:.0%}")
        del x


def _unit_step(
    kind: str, backend: str, x: Tensor, layer: Any, neuron: Any, surrogate: Any
) -> Callable[[], None]:
    """Make a function that runs forward and backward of the neuron, or of BN + neuron."""
    if backend == "spikingjelly_triton":
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        node = neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m", backend="triton")
        reset = functional.reset_net
    else:
        from scalesnn import functional

        node = neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m", backend=backend)
        reset = functional.reset_net
    bn = layer.BatchNorm2d(x.shape[2], step_mode="m").to(x.device, x.dtype if backend != "cupy" else None)
    if backend == "torch":
        bn.backend = "torch"
    leaf = x.detach().clone().requires_grad_()
    grad = torch.ones_like(x)

    def step() -> None:
        reset(node)
        leaf.grad = None
        if kind == "neuron":
            out = node(leaf)
        else:
            out = bn(leaf, neuron=node) if backend != "spikingjelly_triton" else node(bn(leaf))
        out.backward(grad)

    return step


def _kernel_seconds(step: Callable[[], None], rounds: int = 5) -> dict[str, float]:
    """Mean seconds on the device of each of our kernels, by its name without ``scalesnn_``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            step()
        torch.cuda.synchronize()
    return {
        event.key.removeprefix("scalesnn_"): event.device_time_total / event.count * 1e-6
        for event in profile.key_averages()
        if event.key.startswith("scalesnn_")
    }


def against_model(
    measured_s: dict[str, float], x: Tensor, device_name: str, bandwidths: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measured shares of the bandwidth beside those that tools/kernel_report.py predicts from machine code.

    Args:
        measured_s: seconds of each kernel for one input ``x``, [T, N, C, H, W] and contiguous.
        device_name: as torch names it; a device without predictions gives an empty list.
        bandwidths: with peak_bytes_per_s, or copy_bytes_per_s where the peak is not known.
    """
    predictions = json.loads((ROOT / "benchmarks" / "results" / "kernel_report.json").read_text())
    bandwidth = bandwidths["peak_bytes_per_s"] or bandwidths["copy_bytes_per_s"]
    wanted = (str(x.dtype).removeprefix("torch."), x.shape[0], False)
    return [
        {
            "kernel": row["kernel"],
            "measured_share": row["bytes"] * x.numel() / measured_s[row["kernel"]] / bandwidth,
            "predicted_share": row["share"],
        }
        for row in predictions
        if (row["dtype"], row["T"], row["channels_last"]) == wanted
        and row["gpu"] in device_name
        and row["kernel"] in measured_s
    ]


# ------------------------------------------------------------------------------------------ training
def training(report: Report, device: torch.device) -> None:
    """Whole training steps of spiking_resnet18 and 50 at several T: AMP, channels_last."""
    from common import make_ours, make_spikingjelly

    from scalesnn import functional

    peer = report.importable("spikingjelly.activation_based.model.spiking_resnet")
    rows: list[dict[str, Any]] = []
    report.record["parts"]["training"] = rows
    for net, T in itertools.product(("spiking_resnet18", "spiking_resnet50"), (4, 8, 16, 32)):
        contenders: dict[str, Callable[[], nn.Module]] = {"scalesnn": lambda net=net: make_ours(net)}
        if peer:
            contenders["spikingjelly_triton"] = lambda net=net: make_spikingjelly(net, "triton")
        row: dict[str, Any] = {"net": net, "T": T, "batch": 16, "seconds": {}, "peak_bytes": {}}
        for name, make in contenders.items():
            if report.out_of_time():
                return
            try:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                model = make().to(device, memory_format=torch.channels_last)
                reset = functional.reset_net
                if name != "scalesnn":
                    from spikingjelly.activation_based import functional as peer_functional

                    reset = peer_functional.reset_net
                base = torch.cuda.memory_allocated()
                row["seconds"][name] = _time_training(model, T, device, reset)
                row["peak_bytes"][name] = torch.cuda.max_memory_allocated() - base
                del model
            except Exception as error:
                row["seconds"][name] = f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}"
        rows.append(row)
        report.write()
        print(f"  {net} T={T}: {row['seconds']} s, {row['peak_bytes']} bytes above the model")
    failures = [r for r in rows if isinstance(r["seconds"].get("scalesnn"), str)]
    if failures:
        raise AssertionError(
            f"{failures[0]['net']} T={failures[0]['T']}: {failures[0]['seconds']['scalesnn']}"
        )


def _time_training(
    model: nn.Module, T: int, device: torch.device, reset: Callable[[nn.Module], None]
) -> float:
    images = torch.randn(16, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(0, 1000, (16,), device=device)
    x = images.expand(T, *images.shape)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).mean(0).float(), targets)
        loss.backward()
        reset(model)

    return seconds(step, rounds=5)


# ------------------------------------------------------------------------------------------ sanitizer
SHORT = (
    "import torch; from scalesnn import layer, neuron, surrogate\n"
    "for dtype in (torch.float32, torch.bfloat16):\n"
    "    x = torch.randn(3, 2, 37, 9, 5, device='cuda', dtype=dtype, requires_grad=True)\n"
    "    for cls in (neuron.IFNode, neuron.ParametricLIFNode):\n"
    "        node = cls(step_mode='m', surrogate_function=surrogate.ATan(), backend='cupy').cuda()\n"
    "        layer.BatchNorm2d(37, step_mode='m').cuda()(x, neuron=node).sum().backward()\n"
    "torch.cuda.synchronize(); print('short pass done')\n"
)


def sanitizer(report: Report, device: torch.device) -> None:
    """compute-sanitizer's memcheck and racecheck over a short pass."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.record["missing"]["compute-sanitizer"] = "not on PATH"
        print("  compute-sanitizer is not on PATH: left out")
        return
    results: dict[str, str] = {}
    report.record["parts"]["sanitizer"] = results
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SHORT]
        left = max(20.0, min(120.0, report.deadline - time.monotonic()))
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=left, env={**_environment()}
        )
        summary = [line for line in run.stdout.splitlines() if "SUMMARY" in line]
        results[check] = summary[-1] if summary else f"exit code {run.returncode}"
        print(f"  {check}: {results[check]}")
        if run.returncode != 0:
            raise AssertionError(f"{check}: {results[check]}")


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def memory(report: Report, device: torch.device) -> None:
    """The planner against the GPU's own count (benchmarks/gpu_memory.py)."""
    import gpu_memory

    gpu_memory.memory(report, device)


def product(report: Report, device: torch.device) -> None:
    """What a user types, beside the CPU (benchmarks/gpu_product.py)."""
    import gpu_product

    gpu_product.product(report, device)


PARTS: dict[str, Callable[[Report, torch.device], None]] = {
    "kernels": kernels,
    "product": product,
    "training": training,
    "speed": speed,
    "memory": memory,
    "sanitizer": sanitizer,
}


def main() -> int:
    """Run the parts; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="measurements stop being started after this"
    )
    args = parser.parse_args()
    unknown = [name for name in args.parts.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--parts: {unknown[0]} is none of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print(f"gpu-check: there is no GPU that torch {torch.__version__} can use here; nothing was checked")
        return 3
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    report = Report(
        ROOT / "benchmarks" / "results" / f"gpu_check_{re.sub(r'[^A-Za-z0-9]+', '_', name).lower()}.json",
        args.minutes,
    )
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    print(
        f"gpu-check on {name} (sm {capability}), torch {torch.__version__}, Python {sys.version.split()[0]}"
    )
    failed: dict[str, str] = {}
    report.write(device=name, capability=capability, torch=torch.__version__, failed=failed)
    if not report.importable("cupy"):
        print("gpu-check: without CuPy the fused kernels cannot run: install cupy-cuda13x")
        report.write()
        return 1
    for part in args.parts.split(","):
        print(f"{part}:")
        start = time.monotonic()
        try:
            PARTS[part](report, device)
        except Exception as error:  # the other parts go on
            failed[part] = f"{type(error).__name__}: {error}"
            print(f"  FAILED: {failed[part]}")
            traceback.print_exc(limit=3)
        report.record.setdefault("seconds", {})[part] = round(time.monotonic() - start, 1)
        report.write()
    print(f"written: {report.path}")
    print("gpu-check: " + (f"{', '.join(failed)} failed" if failed else "all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
