"""Bytes kept for the backward pass per neuron and time-step under a policy, and the largest T on 80 GiB.

    python benchmarks/memory_saved_bytes.py --net spiking_resnet50

FakeTensorMode, 224², 32 images, bf16. SpikingJelly's largest T follows from the bytes that its autograd
saves, counted in the same way (benchmarks/saved_bytes.py) in this run, without its working set: a bound in
its favour.
Writes benchmarks/results/memory_saved_bytes.json.
"""

from __future__ import annotations

import argparse

import torch
from common import machine, make_ours, make_spikingjelly, save
from saved_bytes import count
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesnn import functional, neuron
from scalesnn.memory import Policy
from scalesnn.memory.planner import Planner

__all__ = ["main"]

BUDGET = 80 * 2**30


def neuron_steps(net: str, shape: tuple[int, ...]) -> int:
    """Elements of all neurons' outputs."""
    total = 0

    def see(node: object, spikes: torch.Tensor, v: object) -> None:
        nonlocal total
        total += spikes.numel()

    with FakeTensorMode():
        model = make_ours(net)
        for module in model.modules():
            if isinstance(module, neuron.BaseNode):
                module.observer = see
        model(torch.empty(shape[1:]).expand(shape))
        functional.reset_net(model)
    return total


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="spiking_resnet50")
    parser.add_argument("--T", type=int, default=16)
    parser.add_argument("--policies", nargs="+", default=["none", "layer", "time:4"])
    args = parser.parse_args()
    shape = (args.T, 32, 3, 224, 224)
    steps = neuron_steps(args.net, shape)
    mode = FakeTensorMode()
    with mode:
        model = make_ours(args.net)
    planner = Planner(model, shape, BUDGET, amp_dtype=torch.bfloat16, mode=mode)
    rows = {}
    for name in args.policies:
        plan = planner.plan(Policy.parse(name))
        rows[name] = {"bytes": plan.saved / steps, "peak": plan.peak, "largest_T": plan.largest_T}
        print(
            f"{name:14} {plan.saved / steps:6.3f} bytes a neuron-step, largest T {plan.largest_T}", flush=True
        )
    from spikingjelly.activation_based.neuron import IFNode

    with FakeTensorMode():
        other = make_spikingjelly(args.net)
        x = torch.empty(shape[1:]).expand(shape)
        saved, _ = count(other, x, True, IFNode)
    largest = int(BUDGET / (saved / args.T))
    print(f"SpikingJelly   {saved / steps:6.3f} bytes a neuron-step, largest T {largest}")
    save(
        "memory_saved_bytes",
        {
            "machine": machine(),
            "arguments": vars(args),
            "neuron_steps": steps,
            "policies": rows,
            "spikingjelly": {"bytes": saved / steps, "largest_T": largest},
        },
    )


if __name__ == "__main__":
    main()
