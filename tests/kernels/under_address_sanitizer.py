"""Run by test_memory_checker.py in a process that AddressSanitizer watches: every kernel on awkward sizes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch

from scalesnn import layer, neuron
from scalesnn.kernels import build, packing, spike_conv


def build_watched(code: str, path: Path, flags: tuple[str, ...]) -> None:
    """In the place of ``build._build``: with the checker in, and a compiler that is not watched."""
    source = path.with_suffix(".cpp")
    source.write_text(code, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    watched = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-fopenmp",
        "-fsanitize=address",
        "-fno-omit-frame-pointer",
    ]
    command = ["g++", *watched, "-shared", "-fPIC", "-w", str(source), "-o", f"{path}.new"]
    subprocess.run(command, check=True, env=environment)
    os.replace(f"{path}.new", path)


def units() -> None:
    """Normalisation, residual, neuron and bits, forward and backward."""
    sizes = [(2, 1, 1, 1, 1), (3, 2, 5, 3, 7), (70, 1, 33, 1, 1), (2, 3, 31, 5, 3)]
    nodes = [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode]
    for size, make, channels_last in itertools.product(sizes, nodes, [False, True]):
        x = torch.randn(size)
        if channels_last:
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, size[:2])
        x.requires_grad_()
        node, norm = make(step_mode="m"), layer.BatchNorm2d(size[2], step_mode="m")
        first = norm(x, neuron=node)
        layer.BatchNorm2d(size[2], step_mode="m")(
            x, neuron=make(step_mode="m"), residual=first
        ).sum().backward()
        norm.eval()(x, neuron=None).sum().backward()


def bits() -> None:
    """Packed and unpacked."""
    for size, planes in itertools.product([1, 31, 32, 33, 1000], [1, 3]):
        x = torch.randint(0, 2**planes, (size,)).float()
        packed = packing.pack(x, planes)
        assert torch.equal(packing.unpack(packed, planes, [size], [1], x.dtype), x)


def convolutions() -> None:
    """Looked up, forward and both gradients."""
    for inputs, stride, padding, size in [(32, 1, 1, 9), (64, 2, 1, 7), (32, 3, 0, 3)]:
        conv = layer.Conv2d(inputs, 32, 3, stride, padding, step_mode="m").to(
            memory_format=torch.channels_last
        )
        node = neuron.IFNode(step_mode="m")
        x = torch.randn(2 * 3, inputs, size, size).contiguous(memory_format=torch.channels_last)
        s = node(x.unflatten(0, (2, 3)).requires_grad_())
        conv(s).sum().backward()


if __name__ == "__main__":
    build._build = build_watched
    if len(sys.argv) > 1:
        spike_conv.SOURCE = Path(sys.argv[1])
    convolutions()
    units()
    bits()
    print("all kernels ran")
