"""Spikes per channel and time-step: dense sums against popcounts of the packed bits.

    python benchmarks/spike_counts.py

The nets run channels_last, so 32 neighbouring bits are 32 channels of one place, and a count per channel goes
across words: 16 shifts of the int64 words, each with four 16-bit counters in a word. Processor time of one
thread, the least of 30. Writes benchmarks/results/spike_counts.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, save
from torch import Tensor

from scalesnn import neuron, surrogate
from scalesnn.kernels import spikes

__all__ = ["main"]

T = 4
SHAPES = ((8, 64, 56), (8, 128, 28), (8, 256, 14), (32, 64, 28), (8, 512, 7))  # N, C, H = W
FIELD = 0x0001_0001_0001_0001


def across_words(bits: Tensor, channels: int) -> Tensor:
    """Counts [T, C] of bits [T, words] whose channels lie side by side, a multiple of 64."""
    words = bits.view(torch.int64).view(len(bits), -1, channels // 64)
    counts = words.new_empty(len(bits), channels // 64, 64)
    for shift in range(16):
        sums = (words.bitwise_right_shift(shift) & FIELD).sum(1)  # four channels, up to 65535 each
        for field in range(4):
            counts[:, :, 16 * field + shift] = (sums >> 16 * field) & 0xFFFF
    return counts.flatten(1)


def milliseconds(run: Callable[[], Any]) -> float:
    """Processor time of this thread."""
    best = float("inf")
    for _ in range(30):
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best * 1e3


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = []
    for n, channels, size in SHAPES:
        node = neuron.IFNode(surrogate_function=surrogate.ATan(), step_mode="m")
        x = torch.randn(T * n, channels, size, size).to(memory_format=torch.channels_last)
        x = x.unflatten(0, (T, n)).requires_grad_()
        fired = node(x)
        packed = spikes.bits_of(fired)
        assert packed is not None
        bits, dense = packed[0], fired.detach()
        assert torch.equal(dense.sum([1, 3, 4]).long(), across_words(bits, channels))

        def unit(node: neuron.IFNode = node, x: Tensor = x) -> None:
            node.reset()
            node(x)

        row = {
            "shape": [T, n, channels, size, size],
            "dense_ms": milliseconds(lambda dense=dense: dense.sum([1, 3, 4], dtype=torch.float32)),
            "bits_ms": milliseconds(lambda bits=bits, channels=channels: across_words(bits, channels)),
            "neuron_forward_ms": milliseconds(unit),
        }
        print(row)
        rows.append(row)
    save("spike_counts", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
