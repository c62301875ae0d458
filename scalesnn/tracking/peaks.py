"""How fast a device can be: dense half-precision peaks, from the vendors' data sheets.

The denominator of model FLOP utilisation (MFU). Structured sparsity is not counted. A device that is not in
the table (and any CPU) has no peak here, and no MFU is reported for it.
"""

from __future__ import annotations

import torch

__all__ = ["PEAK_TFLOPS", "peak_flops"]

# A part of torch.cuda.get_device_name, most particular first: dense bf16 (fp16 where there is no bf16)
# TFLOP/s.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("RTX 6000 Ada", 364.3),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.2),
)


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of ``device`` for dense half-precision matrix work; None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Peak FLOP/s of the device called ``name``; None where it is not in the table."""
    for part, tflops in PEAK_TFLOPS:
        if part in name:
            return tflops * 1e12
    return None
