"""Bytes kept for the backward pass per neuron and time-step, over the whole net, counted under
FakeTensorMode; and the largest T of spiking_resnet50 on 80 GiB (224², 32 images, bf16) under policies.

    python benchmarks/saved_bytes.py --net spiking_resnet18 --T 4 --batch-size 32 --size 224

Every distinct storage that autograd saves counts once, parameters not at all; a tensor that is not otherwise
alive (the input image) neither. A neuron-step is one element of a neuron's output. scalesnn's largest T is
the planner's; SpikingJelly's follows from what its autograd keeps alone, without a working set: a bound in
its favour. Writes benchmarks/results/saved_bytes.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import machine, make_ours, make_spikingjelly, save
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

BUDGET = 80 * 2**30


def count(model: nn.Module, x: Tensor, autocast: bool, neuron_class: type[nn.Module]) -> tuple[int, int]:
    """Saved bytes and neuron-steps of one forward pass."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers(), x]}
    sizes: dict[int, int] = {}
    alive = []
    neuron_steps = 0

    def saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other storage takes its place
        return tensor

    def observe(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal neuron_steps
        neuron_steps += output.numel()

    neurons = [module for module in model.modules() if isinstance(module, neuron_class)]
    if hasattr(neurons[0], "observer"):
        for module in neurons:
            module.observer = lambda node, spikes, v: observe(node, None, spikes)
    else:
        for module in neurons:
            module.register_forward_hook(observe)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = model(x).float().mean()
    del loss
    return sum(sizes.values()), neuron_steps


def measure(
    maker: Any, neuron_class: type[nn.Module], args: argparse.Namespace, dynamic: bool, autocast: bool
) -> float:
    """Bytes per neuron-step of a net."""
    with FakeTensorMode():
        model = maker(args.net)
        n, size = args.batch_size, args.size
        x = (
            torch.empty(args.T, n, 3, size, size)
            if dynamic
            else torch.empty(n, 3, size, size).expand(args.T, -1, -1, -1, -1)
        )
        total, steps = count(model, x, autocast, neuron_class)
    return total / steps


def largest_T(policies: list[str]) -> dict[str, int]:
    """The largest T on BUDGET, by policy, and SpikingJelly's."""
    from spikingjelly.activation_based.neuron import BaseNode

    from scalesnn.memory import Policy
    from scalesnn.memory.planner import Planner

    shape, mode = (16, 32, 3, 224, 224), FakeTensorMode()
    with mode:
        model = make_ours("spiking_resnet50")
    planner = Planner(model, shape, BUDGET, amp_dtype=torch.bfloat16, mode=mode)
    found = {name: planner.plan(Policy.parse(name)).largest_T for name in policies}
    with FakeTensorMode():
        saved, _ = count(
            make_spikingjelly("spiking_resnet50"), torch.empty(shape[1:]).expand(shape), True, BaseNode
        )
    return {**found, "spikingjelly": BUDGET * shape[0] // saved}


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="spiking_resnet18")
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()

    from spikingjelly.activation_based import neuron as peer_neuron

    from scalesnn import neuron

    results: dict[str, float] = {}
    for autocast in (False, True):
        dtype = "bf16" if autocast else "fp32"
        for dynamic in (False, True):
            kind = "different images" if dynamic else "static image"
            results[f"scalesnn, {dtype}, {kind}"] = measure(
                make_ours, neuron.BaseNode, args, dynamic, autocast
            )
        results[f"spikingjelly, {dtype}"] = measure(
            make_spikingjelly, peer_neuron.BaseNode, args, True, autocast
        )
    for name, value in results.items():
        print(f"{name:44} {value:6.2f} B per neuron and time-step")
    largest = largest_T(["none", "layer", "time:4", "time:16"])
    print("largest T of spiking_resnet50 on 80 GiB:", largest)
    record = {"machine": machine(), "arguments": vars(args), "bytes_per_neuron_step": results}
    save("saved_bytes", {**record, "largest_T": largest})


if __name__ == "__main__":
    main()
