"""Peak resident memory of one fp32 training step on the CPU above the loaded model: spiking_resnet18 of
scalesnn and of
SpikingJelly, each in a process of its own.

    python benchmarks/peak_memory.py --T 16 --batch-size 2 --size 128

Writes benchmarks/results/peak_memory.json.
"""

from __future__ import annotations

import argparse

from common import (
    in_turn,
    machine,
    make_ours,
    make_spikingjelly,
    peak_above,
    save,
    static_images,
    training_step,
)


def measure(contender: str, args: argparse.Namespace) -> None:
    """Print the peak above the model, in bytes, of this process' second training step."""
    import torch

    if contender == "scalesnn":
        from scalesnn import functional
        from scalesnn.memory import use_arena

        use_arena()  # as the Trainer does
        model = make_ours().to(memory_format=torch.channels_last)
        reset = functional.reset_net
    else:
        from spikingjelly.activation_based import functional as peer

        model, reset = make_spikingjelly(), peer.reset_net
    last = contender == "scalesnn"
    warm_x, warm_y = static_images(2, 1, 32, channels_last=last)
    training_step(model, warm_x, warm_y, reset)  # code, thread pools, gradients of the parameters
    x, y = static_images(args.T, args.batch_size, args.size, channels_last=last)
    print(peak_above(lambda: training_step(model, x, y, reset)))


def main() -> None:
    """Measure both, several times, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--T", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("scalesnn", "spikingjelly"), help="measure one in this process")
    args = parser.parse_args()
    if args.only:
        measure(args.only, args)
        return
    peaks = in_turn(__file__, ("scalesnn", "spikingjelly"), args.rounds)
    best = {name: min(values) for name, values in peaks.items()}
    for name, value in best.items():
        print(f"{name:14} {value / 2**20:7.0f} MiB above the model")
    ratio = best["scalesnn"] / best["spikingjelly"]
    print(f"scalesnn / SpikingJelly: {ratio:.2f}")
    record = {"machine": machine(), "arguments": vars(args), "peak_bytes": peaks, "ratio": ratio}
    save("peak_memory", record)


if __name__ == "__main__":
    main()
