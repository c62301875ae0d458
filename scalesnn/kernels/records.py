"""What a unit is, as records; and the one place that flattens them for torch.library, whose operators take no
records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from scalesnn.kernels.source import IDENTITY

__all__ = ["CHARGES", "NO_NEURON", "NeuronParameters", "UnitInputs", "schema_of"]

CHARGES = {
    "identity": 0,
    "integrate": 1,
    "leaky_with_input": 2,
    "leaky": 3,
}  # enum Charge of the kernel source


class NeuronParameters(NamedTuple):
    """A neuron as the kernels see it.

    Attributes:
        charge: one of CHARGES; 'identity' returns what a neuron would take.
        v_threshold, v_reset, detach_reset, tau: as ``neuron.LIFNode`` has them.
        surrogate, surrogate_parameters: ``source.surrogate_key`` and the values of the names in it.
    """

    charge: str = "identity"
    v_threshold: float = 0.0
    v_reset: float | None = None
    detach_reset: bool = False
    surrogate: str = IDENTITY
    surrogate_parameters: tuple[float, ...] = ()
    tau: float = 1.0

    @property
    def fires(self) -> bool:
        """Whether there is a neuron."""
        return self.charge != "identity"


NO_NEURON = NeuronParameters()


class UnitInputs(NamedTuple):
    """What ``ops.unit`` takes. T time-steps, N batch, C channels, … space.

    Attributes:
        x: input current, or a convolution's output; [T, N, C, …], float32, float64, bfloat16 or float16.
        affine: [4, C] in ``real_dtype``: mean, scale and bias of y = (x - mean) * scale + bias, and 1 / the
            standard deviation (``normalisation.coefficients``); None: y = x.
        statistics: float64 [C + 1], 1 / (variance + eps) of the batch and the number of values of a channel,
            where mean and scale are statistics of ``x`` itself: then the gradient of ``x`` runs through them
            too. None: they are constants.
        weight, bias: BatchNorm's parameters, for their gradients: their values are in ``affine``.
        residual: [T, N, C, …], added to y; not with ``repeats`` > 1.
        residual_bits: the same where it is spikes: kept for the backward pass in its place.
        residual_x, residual_affine: where it is itself a normalised tensor: what was normalised, and its
            ``affine``; kept in its place.
        v: potentials before the first step [N, C, …]; None: ``v_init`` everywhere.
        decay: 1 / tau as a tensor with one element, to be learned; None: ``neuron.tau``.
        repeats: of ``x`` [1, N, C, …], of which all T steps are the same.
        v_every_step: return the potentials after every step rather than after the last.
        with_bits: pack the spikes too.
        group: the name of the process group over which the statistics were taken, or ''.
        neuron: what fires.
    """

    x: Tensor
    affine: Tensor | None = None
    statistics: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_bits: Tensor | None = None
    residual_x: Tensor | None = None
    residual_affine: Tensor | None = None
    v: Tensor | None = None
    decay: Tensor | None = None
    repeats: int = 1
    v_init: float = 0.0
    v_every_step: bool = False
    with_bits: bool = False
    group: str = ""
    neuron: NeuronParameters = NO_NEURON

    def flat(self) -> tuple[Any, ...]:
        """All values, in the order of ``schema_of``."""
        return (*self[:-1], *self.neuron)

    @classmethod
    def of(cls, values: Sequence[Any]) -> UnitInputs:
        """The record of ``flat`` values, of which torch.library makes lists."""
        charge, threshold, v_reset, detach, surrogate, parameters, tau = values[NEURON:]
        neuron = NeuronParameters(charge, threshold, v_reset, detach, surrogate, tuple(parameters), tau)
        return cls._make((*values[:NEURON], neuron))


NEURON = len(UnitInputs._fields) - 1  # the place of the neuron's first value in ``flat``
TENSORS = UnitInputs._fields.index("repeats")  # how many of them, from the first, are tensors

_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "str": "str",
    "tuple[float, ...]": "float[]",
}


def schema_of() -> str:
    """The arguments of an operator that takes ``UnitInputs``, as torch.library writes them."""
    own = {name: kind for name, kind in UnitInputs.__annotations__.items() if name != "neuron"}
    both = own | NeuronParameters.__annotations__
    kinds = {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in both.items()}
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in kinds.items())
