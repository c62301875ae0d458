"""Spiking neurons: IF, LIF and parametric LIF nodes, in plain torch, with a seam for the fused kernels.

Per time-step, with x the input current, h the charge, v the membrane potential after the spike s:

    h[t] = v[t-1] + x[t]                                   IF
    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau      LIF, decay_input
    h[t] = v[t-1] - (v[t-1] - v_reset) / tau + x[t]        LIF, decay_input=False; PLIF: 1/tau = sigmoid(w)
    s[t] = heaviside(h[t] - v_threshold)
    v[t] = h[t] (1 - s[t]) + v_reset s[t]                  hard reset
    v[t] = h[t] - v_threshold s[t]                         soft reset (v_reset None; 0 in the decay)

The membrane potential is kept in float32 when the input is bfloat16 or float16, else in the input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn.base import MemoryModule, UserError
from scalesnn.kernels.deferred import Deferred, settle
from scalesnn.kernels.spikes import is_spikes, mark_spikes
from scalesnn.kernels.unit import (
    NeuronParameters,
    Normalisation,
    backend_name,
    fused_unit,
    log_backend,
    neuron_surrogate,
    normalise,
    usable,
    why_not_cupy,
)
from scalesnn.movers import missing
from scalesnn.surrogate import Sigmoid, SurrogateFunctionBase

__all__ = ["BaseNode", "IFNode", "LIFNode", "ParametricLIFNode"]


class BaseNode(MemoryModule):
    """A spiking neuron. Subclasses define ``neuronal_charge``.

    Args:
        v_threshold: the neuron fires where the charge reaches it.
        v_reset: the potential after a spike; None subtracts ``v_threshold`` instead (soft reset).
        surrogate_function: how gradients pass a spike; ``surrogate.Sigmoid()`` if not given.
        detach_reset: keep the reset out of the autograd graph.
        step_mode: ``'s'`` for inputs [N, …], ``'m'`` for sequences [T, N, …].
        backend: ``'auto'`` (the fastest here), ``'torch'`` (the reference), ``'cupy'`` (fused, CUDA).
        store_v_seq: keep the potential after every step in ``v_seq`` [T, N, …].

    ``v`` is a float until the first step and a tensor [N, …] afterwards; call ``functional.reset_net``
    between batches. ``truncate``, if not 0, is after how many steps gradients are cut (set by the policy
    ``time:K,detach``). ``observer``, if set, is called after every multi-step forward with the node, the
    spikes (detached) and the last ``v`` (detached).
    """

    supported_backends: tuple[str, ...] = ("auto", "torch", "cupy")
    v: Tensor | float
    v_seq: Tensor | None
    truncate: int = 0

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SurrogateFunctionBase | None = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
    ) -> None:
        super().__init__()
        self.v_threshold = float(v_threshold)
        self.v_reset = None if v_reset is None else float(v_reset)
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        self.detach_reset = detach_reset
        self.step_mode = step_mode
        self.backend = backend
        self.store_v_seq = store_v_seq
        self.observer: Callable[[BaseNode, Tensor, Tensor | None], None] | None = None
        self.register_memory("v", self.v_reset or 0.0)
        self.register_memory("v_seq", None)

    @property
    def backend(self) -> str:
        """Which implementation runs; setting one that does not exist raises UserError."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in self.supported_backends:
            known = ", ".join(self.supported_backends)
            raise UserError(f"backend of {type(self).__name__} must be one of {known}, got {value!r}")
        self._backend = value

    def neuronal_charge(self, x: Tensor) -> None:
        """Add the input current to ``v``: the charge h."""
        raise NotImplementedError(f"{type(self).__name__} does not define neuronal_charge")

    def neuronal_fire(self) -> Tensor:
        """Spikes of the charge in ``v``."""
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike: Tensor) -> None:
        """Turn the charge in ``v`` into the potential after the spike."""
        if self.detach_reset:
            spike = spike.detach()
        if self.v_reset is None:
            self.v = self.v - self.v_threshold * spike
        else:
            self.v = (1.0 - spike) * self.v + self.v_reset * spike

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One time-step: input current [N, …] to spikes of the same shape and dtype."""
        self.prepare_v(x)
        self.neuronal_charge(x.to(_state_dtype(x)))
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike.to(x.dtype)

    def multi_step_forward(self, x_seq: Tensor, norm: Normalisation | None = None) -> Tensor:
        """A sequence of input currents [T, N, …] to spikes of the same shape, dtype and memory format.

        Args:
            norm: see ``forward``.

        Raises:
            UserError: T < 1, or ``v`` is left over from inputs of another shape.
        """
        if x_seq.dim() < 1 or x_seq.shape[0] < 1:
            raise UserError(f"expected a sequence [T, N, …] with T >= 1, got the shape {tuple(x_seq.shape)}")
        if self.truncate and torch.is_grad_enabled():
            spikes = self._truncated(x_seq, norm)
        else:
            spikes = self._sequence(x_seq, norm)
        if self.observer is not None:
            self.observer(self, spikes.detach(), self.v.detach() if isinstance(self.v, Tensor) else None)
        return spikes

    def _sequence(self, x_seq: Tensor, norm: Normalisation | None = None) -> Tensor:
        spikes = self._fused(x_seq, norm)
        return self._torch_multi_step(x_seq) if spikes is None else spikes

    def _truncated(self, x_seq: Tensor, norm: Normalisation | None = None) -> Tensor:
        """The sequence by ``truncate`` steps; no gradient goes from one part to the one before it."""
        x_seq = settle(x_seq, norm is not None)
        if isinstance(x_seq, Deferred):  # it knows where to truncate
            return self._sequence(x_seq, norm)
        parts, potentials = [], []
        for x in (x_seq if norm is None else normalise(x_seq, norm)).split(self.truncate):
            parts.append(self._sequence(x))
            potentials.append(self.v_seq)
            if isinstance(self.v, Tensor):
                self.v = self.v.detach()
        if self.store_v_seq:
            self.v_seq = torch.cat([v for v in potentials if v is not None])
        out = torch.cat(parts)
        return mark_spikes(out) if all(is_spikes(part) == 1 for part in parts) else out

    def forward(self, x: Tensor, norm: Normalisation | None = None) -> Tensor:
        """Spikes of one step or of a sequence, as ``step_mode`` says.

        Args:
            x: input current, [N, …] or [T, N, …].
            norm: what a normalisation layer does to ``x`` first; given by the layer where ``fuses(x)``.
        """
        if self.step_mode == "m":
            return self.multi_step_forward(x, norm)
        spike = self.single_step_forward(x)
        if self.store_v_seq and isinstance(self.v, Tensor):
            v = self.v.unsqueeze(0)
            self.v_seq = v if self.v_seq is None else torch.cat([self.v_seq, v])
        return spike

    def prepare_v(self, x: Tensor) -> None:
        """Make ``v`` a tensor fit for the input ``x`` [N, …] of one step.

        Raises:
            UserError: ``v`` is left over from inputs of another shape.
        """
        if isinstance(self.v, Tensor):
            self._fit_v(x, x.shape)
        else:
            self.v = torch.full_like(x, self.v, dtype=_state_dtype(x), requires_grad=False)

    def _fit_v(self, x: Tensor, shape: torch.Size) -> None:
        """Have the tensor ``v`` fit inputs of one step of this shape, like ``x``."""
        assert isinstance(self.v, Tensor)
        if self.v.shape != shape:
            raise UserError(
                f"{type(self).__name__} holds potentials of shape {tuple(self.v.shape)} but got an input of "
                f"shape {tuple(shape)}: call functional.reset_net(net) between batches"
            )
        self.v = self.v.to(x.device, _state_dtype(x))

    def fuses(self, x_seq: Tensor) -> bool:
        """Whether a fused kernel runs this neuron on inputs like ``x_seq`` [T, N, …].

        Raises:
            UserError: backend 'cupy' cannot run on ``x_seq``.
        """
        plain = self.step_mode != "m" or self._kernel_neuron is None or not self.surrogate_function.spiking
        if self.backend == "cupy":
            reason = "this neuron or its surrogate has no fused kernel" if plain else why_not_cupy(x_seq)
            if reason is not None:
                raise UserError(f"{type(self).__name__}: {reason}")
        return (
            not plain
            and self.surrogate_function.kernel_expression is not None
            and usable(x_seq, self.backend)
        )

    @property
    def _kernel_neuron(self) -> str | None:
        """The name of this neuron's charge in ``kernels.records.CHARGES``; None for one the kernels do not
        know, such as a subclass with a charge, a fire or a reset of its own."""
        kind = type(self)
        if kind not in _charges:
            _charges[kind] = _find_charge(kind)
        charge = _charges[kind]
        return "leaky_with_input" if charge == "leaky" and self.decay_input else charge

    def _fused(self, x_seq: Tensor, norm: Normalisation | None = None) -> Tensor | None:
        """Spikes from a fused kernel, with ``v`` (and ``v_seq``) updated; None where none can run."""
        fuses = norm is not None or self.fuses(x_seq)  # with a normalisation, its layer has asked
        if not torch.compiler.is_compiling():
            log_backend(backend_name(x_seq.device) if fuses else "torch", x_seq.device.type)
        parameters = self._kernel_parameters() if fuses else None
        if parameters is None:
            return None
        if isinstance(self.v, Tensor):
            self._fit_v(x_seq, x_seq.shape[1:])
        w = getattr(self, "w", None)
        decay = None if w is None else w.sigmoid()
        spikes, v = fused_unit(x_seq, parameters, self.v, self.store_v_seq, norm, decay)
        if self.store_v_seq:
            self.v_seq, self.v = v, v[-1]
        else:
            self.v = v
        return spikes

    def _kernel_parameters(self) -> NeuronParameters | None:
        """The neuron as the kernels have it; None where they cannot have its surrogate."""
        surrogate, charge = self.surrogate_function, self._kernel_neuron
        assert charge is not None
        known = neuron_surrogate(surrogate.kernel_expression, surrogate.kernel_parameters())
        if known is None:
            return None
        numbers = (self.v_threshold, self.v_reset, self.detach_reset)
        return NeuronParameters(charge, *numbers, *known, getattr(self, "tau", 1.0))

    def _torch_multi_step(self, x_seq: Tensor) -> Tensor:
        """The reference: one step after the other in plain torch."""
        spikes, potentials = [], []
        for x in x_seq:
            spikes.append(self.single_step_forward(x))
            if self.store_v_seq and isinstance(self.v, Tensor):
                potentials.append(self.v)
        if self.store_v_seq:
            self.v_seq = _stack(potentials)
        return _stack(spikes)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}, "
            f"step_mode={self.step_mode}, backend={self.backend}"
        )


class IFNode(BaseNode):
    """Integrate and fire: the potential is the sum of the inputs since the last spike. Arguments: see
    BaseNode."""

    def neuronal_charge(self, x: Tensor) -> None:
        """h = v + x."""
        self.v = self.v + x


class _LeakyNode(BaseNode):
    """What LIF and parametric LIF share."""

    def __init__(self, decay_input: bool, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.decay_input = decay_input

    def _above_rest(self) -> Tensor | float:
        """v - v_reset: what leaks away."""
        return self.v - self.v_reset if self.v_reset else self.v

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"{super().extra_repr()}, tau={self._shown_tau()}, decay_input={self.decay_input}"

    def _shown_tau(self) -> object:
        raise NotImplementedError


class LIFNode(_LeakyNode):
    """Leaky integrate and fire.

    Args:
        tau: membrane time constant, greater than 1.
        decay_input: divide the input by ``tau`` too.
        others: BaseNode's, in its order.
    """

    def __init__(self, tau: float = 2.0, decay_input: bool = True, *others: Any, **named: Any) -> None:
        super().__init__(decay_input, *others, **named)
        self.tau = _checked_tau(type(self).__name__, "tau", tau)

    def neuronal_charge(self, x: Tensor) -> None:
        """h = v + (x - (v - v_reset)) / tau, or with the input not divided."""
        v = self._above_rest()
        self.v = self.v + (x - v) / self.tau if self.decay_input else self.v - v / self.tau + x

    def _shown_tau(self) -> object:
        return self.tau


class ParametricLIFNode(_LeakyNode):
    """Leaky integrate and fire whose time constant is learned: 1 / tau = sigmoid(w) (Fang et al. 2021).

    Args:
        init_tau: tau at the start, greater than 1. The parameter is ``w``, a scalar.
        decay_input: divide the input by tau too.
        others: BaseNode's, in its order.
    """

    def __init__(self, init_tau: float = 2.0, decay_input: bool = True, *others: Any, **named: Any) -> None:
        super().__init__(decay_input, *others, **named)
        init_tau = _checked_tau(type(self).__name__, "init_tau", init_tau)
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1)))

    def neuronal_charge(self, x: Tensor) -> None:
        """h as LIF's, with 1 / tau = sigmoid(w)."""
        v, rate = self._above_rest(), self.w.sigmoid().to(x.dtype)
        self.v = self.v + (x - v) * rate if self.decay_input else self.v - v * rate + x

    def _shown_tau(self) -> object:
        w = self.w.detach()  # held by another rank where it is empty (ZeRO-3)
        return f"{1 / w.sigmoid().item():.6g}" if w.numel() else "elsewhere"


_charges: dict[type, str | None] = {}  # of classes, what ``_find_charge`` found


def _find_charge(kind: type[BaseNode]) -> str | None:
    if any(getattr(kind, name) is not getattr(BaseNode, name) for name in _FUSED_METHODS):
        return None
    if kind.neuronal_charge is IFNode.neuronal_charge:
        return "integrate"
    leaky = (LIFNode.neuronal_charge, ParametricLIFNode.neuronal_charge)
    return "leaky" if kind.neuronal_charge in leaky else None


_FUSED_METHODS = ("neuronal_fire", "neuronal_reset", "single_step_forward", "_torch_multi_step", "prepare_v")


def _checked_tau(owner: str, name: str, tau: float) -> float:
    if not tau > 1:
        raise UserError(f"{name} of {owner} must be greater than 1, got {tau}")
    return float(tau)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _stack(steps: list[Tensor]) -> Tensor:
    """[N, …] × T to [T, N, …], whose flatten(0, 1) keeps the steps' memory format (stack would lose
    channels_last)."""
    if steps[0].dim() == 0:
        return torch.stack(steps)
    return torch.cat(steps).unflatten(0, (len(steps), steps[0].shape[0]))


if not TYPE_CHECKING:  # for type checkers a name that is not here is an error

    def __getattr__(name: str) -> Any:
        """Say what comes nearest to a name of SpikingJelly's that is not here."""
        raise missing(__name__, name, __all__)
