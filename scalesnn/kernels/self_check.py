"""Before the first use of the GPU kernels in a process: do they compile, run and compute rightly here?

CuPy can be imported where NVRTC is missing or does not know the GPU; then the first kernel of a run would end
it. So one small unit, BatchNorm and LIF over four steps, runs forward and backward on the device and is
compared with plain torch (once for each dtype; under a second where the kernels are in the cache). Where it
fails, neurons run in plain torch, and one warning says why.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from scalesnn.kernels import cuda, normalisation, ops
from scalesnn.kernels.build import reason
from scalesnn.kernels.records import NeuronParameters, UnitInputs
from scalesnn.kernels.source import surrogate_key

__all__ = ["compare_with_torch", "give_up", "problem", "why_given_up"]

SHAPE = (4, 2, 3, 7, 9)  # [T, N, C, H, W]: more neurons than a block has threads
TAU, THRESHOLD, EPS, ALPHA = 2.0, 0.4, 1e-5, 2.0
ATAN = surrogate_key("alpha / 2 / (1 + square(real(M_PI / 2) * alpha * x))", ("alpha",))  # surrogate.ATan's
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

_given_up: str | None = None


def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this process does not use the kernels on a GPU, in one line; None where it does.

    After one failure no kernel is used any more, of whatever dtype.
    """
    found = _given_up or cuda.why_not() or _checked(device, dtype)
    if found is not None:
        give_up(found)
    return found


def give_up(why: str) -> None:
    """Use plain torch on GPUs from here on: the kernels do not work here, or not on another rank's GPU."""
    global _given_up
    _given_up = _given_up or why


def why_given_up() -> str | None:
    """What ``give_up`` was first told."""
    return _given_up


@cache
def _checked(device: torch.device, dtype: torch.dtype) -> str | None:
    # In a thread of its own: there no mode of the caller is on (autocast, inference, fake tensors, policies).
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(compare_with_torch, device, dtype).result()


def compare_with_torch(device: torch.device, dtype: torch.dtype) -> str | None:
    """Run the kernels once on ``device``; what failed, or which result differs from torch's, in one line.

    Raises:
        torch.OutOfMemoryError: the device is full, which says nothing of the kernels.
    """
    try:
        given = _inputs(device, dtype)
        expected, found = _plain(*given), _fused(*given)
        for name, right, value in zip(
            ("spikes", "v", "gradient of x", "gradient of weight", "gradient of bias"),
            expected,
            found,
            strict=True,
        ):
            difference = (value.double() - right.double()).abs().max().item()
            if not difference <= TOLERANCE[dtype] * max(1.0, right.abs().max().item()):
                return (
                    f"the CUDA kernels compute wrongly on this GPU: the {name} in "
                    f"{str(dtype).removeprefix('torch.')} differs from torch's by {difference:.2g}"
                )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # CuPy, NVRTC and the driver raise all kinds
        return f"the CUDA kernels do not run here: {reason(error)}"
    return None


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, N, C, H, W], weight [C], bias [C] and the gradient of the spikes; no random number is drawn."""
    count = torch.Size(SHAPE).numel()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = torch.arange(count, dtype=torch.float64)
    x = (1.5 * torch.sin(12.9 * numbers + 0.3)).view(SHAPE).to(device, dtype)
    x = x.movedim(2, -1).contiguous().movedim(-1, 2)  # channels_last, as in training
    grad = torch.cos(7.7 * numbers).view(SHAPE).to(device, dtype)
    weight = torch.tensor([0.9, 1.1, 1.3], dtype=real, device=device)
    bias = torch.tensor([0.1, 0.2, -0.1], dtype=real, device=device)
    return x, weight, bias, grad


def _fused(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """Spikes, the last v, and the gradients of x, weight and bias, by the kernels."""
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in (x, weight, bias))
    sums = normalisation.statistics(x.detach())
    affine, statistics = normalisation.coefficients(
        sums, x.dtype, weight.detach(), bias.detach(), None, None, None, EPS, None
    )
    lif = NeuronParameters("leaky_with_input", THRESHOLD, 0.0, False, ATAN, (ALPHA,), TAU)
    spikes, v, _ = ops.unit(UnitInputs(x, affine, statistics, weight, bias, with_bits=True, neuron=lif))
    return [spikes.detach(), v.detach(), *torch.autograd.grad(spikes, [x, weight, bias], grad)]


def _plain(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The same in plain torch, in float64 from the same rounded inputs."""
    x, weight, bias = (tensor.double().requires_grad_() for tensor in (x, weight, bias))
    variance, mean = torch.var_mean(x, (0, 1, 3, 4), correction=0, keepdim=True)
    shape = (1, 1, -1, 1, 1)
    y = (x - mean) * (variance + EPS).rsqrt() * weight.view(shape) + bias.view(shape)
    v, spikes = torch.zeros_like(y[0]), []
    for y_now in y:
        h = v + (y_now - v) / TAU
        soft = (
            torch.atan(torch.pi / 2 * ALPHA * (h - THRESHOLD)) / torch.pi
        )  # its derivative is the surrogate's
        spike = (h >= THRESHOLD).double() + soft - soft.detach()
        v = h * (1 - spike)
        spikes.append(spike)
    out = torch.stack(spikes)
    gradients = torch.autograd.grad(out, [x, weight, bias], grad.double())
    return [out.detach().round(), v.detach(), *gradients]
