"""The unit conv → BN → (+ residual) → neuron on tensors: what neurons and normalisation layers call."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from scalesnn.kernels import cpu, cuda, launch, ops, self_check, spikes
from scalesnn.kernels.deferred import Deferred, settle
from scalesnn.kernels.records import NO_NEURON, NeuronParameters, UnitInputs
from scalesnn.kernels.source import SCALARS, surrogate_key

__all__ = [
    "NeuronParameters",
    "Normalisation",
    "fused_unit",
    "log_backend",
    "normalise",
    "usable",
    "why_not_cupy",
]

logger = logging.getLogger("scalesnn")


@dataclass
class Normalisation:
    """y = (x - mean) * scale + bias, then + residual.

    Args:
        affine, statistics, weight, bias, group: see ``records.UnitInputs``.
        residual: like x, or None.
    """

    affine: Tensor
    statistics: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    group: str = ""
    residual: Tensor | None = None


def usable(x: Tensor, backend: str) -> bool:
    """Whether the fused ops run on ``x``.

    Args:
        backend: 'auto', 'torch' or 'cupy'.

    Raises:
        ValueError: 'cupy' was asked for and cannot be.
    """
    if backend == "torch":
        return False
    if backend == "cupy":
        reason = why_not_cupy(x)
        if reason is not None:
            raise ValueError(reason)
    if x.dim() == 0 or not launch.available(x.device, x.dtype):
        return False
    if x.device.type != "cuda":
        return True
    if torch.compiler.is_compiling():  # which does not trace a check
        return self_check.why_given_up() is None
    return self_check.problem(x.device, x.dtype) is None


def why_not_cupy(x: Tensor) -> str | None:
    """Why backend 'cupy' cannot run on ``x``, in one line; None where it can."""
    if x.device.type != "cuda":
        return f"backend 'cupy' needs CUDA tensors, got one on {x.device}: backend 'auto' runs everywhere"
    reason = cuda.why_not()
    if reason is None and x.dtype in SCALARS and not torch.compiler.is_compiling():
        reason = self_check.problem(x.device, x.dtype)
    return None if reason is None else f"backend 'cupy': {reason}; backend 'auto' runs without it"


@cache
def log_backend(name: str, device_type: str) -> None:
    """Log once which backend neurons use on a kind of device, and warn of plain torch on a GPU."""
    logger.info("neurons on %s: %s", device_type, name)
    if device_type == "cuda" and name == "torch":
        reason = cuda.why_not() or self_check.why_given_up()
        reason = reason or "this neuron or dtype has no fused kernel, or backend 'torch' was chosen"
        logger.warning(
            "neurons run in plain torch on the GPU: about 10 launches per time-step, and 17.6 instead of 4.1 "
            "bytes kept per neuron and time-step (%s)",
            reason,
        )


def fused_unit(
    x: Tensor,
    neuron: NeuronParameters | None,
    v: Tensor | float = 0.0,
    v_every_step: bool = False,
    norm: Normalisation | None = None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the unit; its spikes are marked as such, with their bits where autograd records.

    Args:
        x: [T, N, C, …], or [T, N, …] without ``norm``.
        neuron: None returns y itself.
        v: the potentials before the first step, [N, C, …] or one number.
        v_every_step: return all potentials [T, N, C, …] rather than the last.
        decay: 1 / tau as a tensor, where it is learned.

    Returns:
        spikes (or y) like ``x``, and v in float32 (float64 for float64).
    """
    x = settle(x, norm is not None)
    if isinstance(x, Deferred):
        return x.unit(neuron, v, v_every_step, norm, decay)
    if norm is not None and isinstance(norm.residual, Deferred):
        norm = replace(norm, residual=norm.residual.plain())
    steps, shape = x.shape[0], x.shape
    once = getattr(spikes.marked(x), "scalesnn_once", None)
    residual = None if norm is None else norm.residual
    repeats = 1
    if residual is None and steps > 1 and (once is not None or x.stride(0) == 0):
        x = x[:1] if once is None else once.unsqueeze(0)
        repeats = steps
    residual_bits = residual_x = residual_affine = None
    recording = torch.is_grad_enabled()
    with_bits = recording or x.device.type == "cpu"  # to be kept, or for the next convolution's look-up
    if residual is not None and recording:
        known = spikes.marked(residual)
        if launch.like(known, launch.dense(x)) is known:
            packed = spikes.bits_of(known) if getattr(known, "scalesnn_largest", 0) == 1 else None
            if packed is not None and packed[1] == 0:
                residual_bits = packed[0]
            elif getattr(known, "scalesnn_affine", None) is not None:
                residual_x, residual_affine = known.scalesnn_normalised, known.scalesnn_affine  # type: ignore[attr-defined]
    u = UnitInputs(
        x,
        None if norm is None else norm.affine,
        None if norm is None else norm.statistics,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        residual,
        residual_bits,
        residual_x,
        residual_affine,
        v if isinstance(v, Tensor) else None,
        decay,
        repeats,
        0.0 if isinstance(v, Tensor) else v,
        v_every_step,
        with_bits and neuron is not None,
        "" if norm is None else norm.group,
        NO_NEURON if neuron is None else neuron,
    )
    out, v_out, bits = ops.unit(u)
    assert out.shape == shape
    if neuron is not None:
        spikes.mark_spikes(out, 1, bits if with_bits else None)
    elif norm is not None and residual is None and repeats == 1 and recording:
        spikes.mark_affine(out, x.detach(), norm.affine)
    return out, v_out


def normalise(x: Tensor, norm: Normalisation) -> Tensor:
    """y = (x - mean) * scale + bias (+ residual), with autograd; x [T, N, C, …]."""
    return fused_unit(x, None, norm=norm)[0]


def neuron_surrogate(
    expression: str | None, parameters: dict[str, float]
) -> tuple[str, tuple[float, ...]] | None:
    """The surrogate as ``NeuronParameters`` has it; None where the kernels cannot have it."""
    if expression is None or len(parameters) > 4:
        return None
    return surrogate_key(expression, tuple(parameters)), tuple(map(float, parameters.values()))


@cache
def backend_name(device: torch.device) -> str:
    """What the fused ops are on a device, for the log."""
    return (
        "fused CUDA kernels (CuPy)" if device.type == "cuda" else f"fused CPU kernels ({cpu.cache_folder()})"
    )
