"""Spike functions: Heaviside forward, a surrogate's derivative backward (Neftci, Mostafa, Zenke 2019).

A surrogate is its name, its parameters and its derivative, written once for torch (``derivative``) and
once, side by side, as a C++ expression for the fused kernels (``kernel_expression``: in ``x``, the
parameters, the type ``real`` and ``square, fabs, exp, log, sqrt, cos, sin``). ``x`` is the membrane
potential less the threshold. With ``spiking=False`` the surrogate itself is computed (``primitive``), where
the field defines one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalesnn.base import UserError
from scalesnn.movers import missing

__all__ = [
    "S2NN",
    "ATan",
    "DeterministicPass",
    "Erf",
    "FakeNumericalGradient",
    "LeakyKReLU",
    "LogTailedReLU",
    "NonzeroSignLogAbs",
    "PiecewiseExp",
    "PiecewiseLeakyReLU",
    "PiecewiseQuadratic",
    "QPseudoSpike",
    "Rect",
    "Sigmoid",
    "SoftSign",
    "SquarewaveFourierSeries",
    "SuperSpike",
    "SurrogateFunctionBase",
    "heaviside",
]


def heaviside(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else 0, in ``x``'s dtype and memory format."""
    return (x >= 0).to(x)


class _Spike(torch.autograd.Function):
    """Heaviside whose gradient is the surrogate's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: SurrogateFunctionBase) -> Tensor:
        return heaviside(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SurrogateFunctionBase], output: Tensor) -> None:
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate.derivative(x), None


class SurrogateFunctionBase(nn.Module):
    """Base of the surrogates: call it with ``v - v_threshold``, get spikes (0 or 1) of the same shape and
    dtype.

    Args:
        spiking: spikes with the surrogate gradient (True), or the smooth primitive function itself (False).
        parameters: the surrogate's numbers; they become attributes and stand in ``kernel_parameters()``.

    A new surrogate defines ``derivative`` and, for the fused kernels, ``kernel_expression``; with None
    there, neurons take the plain torch path.
    """

    kernel_expression: str | None = None

    def __init__(self, spiking: bool = True, **parameters: float) -> None:
        super().__init__()
        self.spiking = spiking
        self._parameter_names = tuple(parameters)
        for name, value in parameters.items():
            setattr(self, name, value)

    def set_spiking_mode(self, spiking: bool) -> None:
        """Choose between spikes (True) and the primitive function (False)."""
        self.spiking = spiking

    def kernel_parameters(self) -> dict[str, float]:
        """The parameters by the names that ``kernel_expression`` uses."""
        return {name: getattr(self, name) for name in self._parameter_names}

    def derivative(self, x: Tensor) -> Tensor:
        """The gradient that a spike passes back at ``x``, elementwise, in ``x``'s dtype."""
        raise NotImplementedError(f"{type(self).__name__} defines no derivative")

    def primitive(self, x: Tensor) -> Tensor:
        """The function whose derivative the surrogate is."""
        raise NotImplementedError(f"{type(self).__name__} has no primitive function: leave spiking=True")

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of ``x``, or ``primitive(x)`` where ``spiking`` is False."""
        return _Spike.apply(x, self) if self.spiking else self.primitive(x)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return ", ".join(
            [f"{n}={getattr(self, n)}" for n in self._parameter_names] + [f"spiking={self.spiking}"]
        )


class _AlphaSurrogate(SurrogateFunctionBase):
    """A surrogate with the one parameter ``alpha`` > 0: the larger, the narrower (or higher) the
    derivative."""

    alpha: float

    def __init__(self, alpha: float, spiking: bool = True) -> None:
        if not alpha > 0:
            raise UserError(f"alpha of {type(self).__name__} must be greater than 0, got {alpha}")
        super().__init__(spiking, alpha=alpha)


class PiecewiseQuadratic(_AlphaSurrogate):
    """Triangle of height ``alpha`` and half-width ``1 / alpha`` (Esser et al. 2016; Bellec et al. 2018)."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "fabs(x) > 1 / alpha ? real(0) : alpha - square(alpha) * fabs(x)"

    def derivative(self, x: Tensor) -> Tensor:
        return (self.alpha - self.alpha**2 * x.abs()).masked_fill(x.abs() > 1 / self.alpha, 0)

    def primitive(self, x: Tensor) -> Tensor:
        x = x.clamp(-1 / self.alpha, 1 / self.alpha)
        return self.alpha * x - self.alpha**2 / 2 * x * x.abs() + 0.5


class PiecewiseExp(_AlphaSurrogate):
    """Two-sided exponential (Shrestha and Orchard 2018)."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "alpha / 2 * exp(-alpha * fabs(x))"

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / 2 * torch.exp(-self.alpha * x.abs())

    def primitive(self, x: Tensor) -> Tensor:
        half = torch.exp(-self.alpha * x.abs()) / 2
        return torch.where(x >= 0, 1 - half, half)


class Sigmoid(_AlphaSurrogate):
    """Derivative of sigmoid(alpha x) (Shrestha and Orchard 2018; Roy et al. 2019)."""

    def __init__(self, alpha: float = 4.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    # s (1 - s) with the sign that cannot overflow
    kernel_expression = "alpha * exp(-alpha * fabs(x)) / square(1 + exp(-alpha * fabs(x)))"

    def derivative(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.alpha * x)
        return self.alpha * s * (1 - s)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.alpha * x)


class SoftSign(_AlphaSurrogate):
    """Derivative of softsign, moved to [0, 1] (Kaiser, Mostafa, Neftci 2020)."""

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "1 / (2 * alpha * square(1 / alpha + fabs(x)))"

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / (2 * self.alpha * (1 / self.alpha + x.abs()).square())

    def primitive(self, x: Tensor) -> Tensor:
        return (F.softsign(self.alpha * x) + 1) / 2


class SuperSpike(_AlphaSurrogate):
    """SuperSpike (Zenke and Ganguli 2018). It has no primitive function."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "alpha / square(1 + fabs(x))"

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / (1 + x.abs()).square()


class ATan(_AlphaSurrogate):
    """Derivative of arctan, scaled to [0, 1] (Fang et al. 2021)."""

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "alpha / 2 / (1 + square(real(M_PI / 2) * alpha * x))"

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * x).square())

    def primitive(self, x: Tensor) -> Tensor:
        return torch.atan(math.pi / 2 * self.alpha * x) / math.pi + 0.5


class NonzeroSignLogAbs(_AlphaSurrogate):
    """Derivative of sign(x) log(1 + alpha |x|); its tails never vanish."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "1 / (1 / alpha + fabs(x))"

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / (1 / self.alpha + x.abs())

    def primitive(self, x: Tensor) -> Tensor:
        value = torch.log1p(self.alpha * x.abs())
        return torch.where(x >= 0, value, -value)


class Erf(_AlphaSurrogate):
    """Gaussian bump, the derivative of the error function (Esser et al. 2015; Yin et al. 2020)."""

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "alpha / sqrt(real(M_PI)) * exp(-square(alpha * x))"

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / math.sqrt(math.pi) * torch.exp(-(self.alpha * x).square())

    def primitive(self, x: Tensor) -> Tensor:
        return torch.erfc(-self.alpha * x) / 2


class PiecewiseLeakyReLU(SurrogateFunctionBase):
    """Box of half-width ``w`` and area 1, and the slope ``c`` outside it (Wu et al. 2018; Yin et al.
    2017)."""

    w: float
    c: float

    def __init__(self, w: float = 1.0, c: float = 0.01, spiking: bool = True) -> None:
        if not w > 0:
            raise UserError(f"w of PiecewiseLeakyReLU must be greater than 0, got {w}")
        super().__init__(spiking, w=w, c=c)

    kernel_expression = "fabs(x) < w ? 1 / (2 * w) : c"

    def derivative(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.c).masked_fill(x.abs() < self.w, 1 / (2 * self.w))

    def primitive(self, x: Tensor) -> Tensor:
        inside = x.clamp(-self.w, self.w)
        return inside / (2 * self.w) + 0.5 + self.c * (x - inside)


class SquarewaveFourierSeries(SurrogateFunctionBase):
    """The first ``n - 1`` terms of a square wave's Fourier series with period ``T_period``,
    differentiated."""

    n: int
    T_period: float

    def __init__(self, n: int = 2, T_period: float = 8, spiking: bool = True) -> None:
        if n < 1 or not T_period > 0:
            raise UserError(
                f"SquarewaveFourierSeries needs n >= 1 and T_period > 0, got n={n}, T_period={T_period}"
            )
        super().__init__(spiking, n=n, T_period=T_period)

    @property
    def kernel_expression(self) -> str:  # type: ignore[override]
        """The series written out for this ``n``."""
        terms = (f"cos(real({2 * i - 1}) * real(2 * M_PI) / T_period * x)" for i in range(1, self.n))
        return f"4 / T_period * ({' + '.join(terms) or 'real(0)'})"

    def derivative(self, x: Tensor) -> Tensor:
        w = 2 * math.pi / self.T_period
        total = torch.zeros_like(x)
        for i in range(1, self.n):
            total = total + torch.cos((2 * i - 1) * w * x)
        return 4 / self.T_period * total

    def primitive(self, x: Tensor) -> Tensor:
        w = 2 * math.pi / self.T_period
        total = torch.zeros_like(x)
        for i in range(1, self.n):
            total = total + torch.sin((2 * i - 1) * w * x) / (2 * i - 1)
        return 0.5 + 2 / math.pi * total


class S2NN(SurrogateFunctionBase):
    """Sigmoid below the threshold, logarithm above it (Suetake et al. 2022)."""

    alpha: float
    beta: float

    def __init__(self, alpha: float = 4.0, beta: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha, beta=beta)

    kernel_expression = "x < 0 ? alpha * exp(alpha * x) / square(1 + exp(alpha * x)) : beta / (1 + x)"

    def derivative(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.alpha * x)
        return torch.where(x < 0, self.alpha * s * (1 - s), self.beta / (1 + x))

    def primitive(self, x: Tensor) -> Tensor:
        # abs and the small constant keep the branch that is not taken finite
        above = self.beta * torch.log((1 + x).abs() + 1e-5) + 0.5
        return torch.where(x < 0, torch.sigmoid(self.alpha * x), above)


class QPseudoSpike(_AlphaSurrogate):
    """q-PseudoSpike: ``alpha`` > 1 sets how heavy the tails are (Herranz-Celotti and Rouat 2022)."""

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        if not alpha > 1:
            raise UserError(f"alpha of QPseudoSpike must be greater than 1, got {alpha}")
        super().__init__(alpha, spiking)

    kernel_expression = "exp(-alpha * log(1 + 2 / (alpha - 1) * fabs(x)))"

    def derivative(self, x: Tensor) -> Tensor:
        return (1 + 2 / (self.alpha - 1) * x.abs()).pow(-self.alpha)

    def primitive(self, x: Tensor) -> Tensor:
        tail = 0.5 * (1 + 2 / (self.alpha - 1) * x.abs()).pow(1 - self.alpha)
        return torch.where(x >= 0, 1 - tail, tail)


class LeakyKReLU(SurrogateFunctionBase):
    """Slope ``k`` from the threshold on, slope ``leak`` below it."""

    leak: float
    k: float

    def __init__(self, leak: float = 0.0, k: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, leak=leak, k=k)

    kernel_expression = "x >= 0 ? k : leak"

    def derivative(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.leak).masked_fill(x >= 0, self.k)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, self.k * x, self.leak * x)


class FakeNumericalGradient(_AlphaSurrogate):
    """The secant's slope ``1 / |x|``, at most ``alpha``. It has no primitive function."""

    def __init__(self, alpha: float = 0.3) -> None:
        super().__init__(alpha)

    kernel_expression = "alpha * fabs(x) > 1 ? 1 / fabs(x) : alpha"

    def derivative(self, x: Tensor) -> Tensor:
        return (1 / x.abs()).clamp_max(self.alpha)


class LogTailedReLU(SurrogateFunctionBase):
    """Slope ``alpha`` up to the threshold, 1 over the next unit, then 1 / x (Cai et al. 2017)."""

    alpha: float

    def __init__(self, alpha: float = 0.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    kernel_expression = "x > 1 ? 1 / x : (x > 0 ? real(1) : alpha)"

    def derivative(self, x: Tensor) -> Tensor:
        return (1 / x.clamp_min(1)).masked_fill(x <= 0, self.alpha)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.where(x > 1, torch.log(x.clamp_min(1)) + 1, F.leaky_relu(x, self.alpha))


class DeterministicPass(SurrogateFunctionBase):
    """Straight-through: the gradient passes unchanged."""

    def __init__(self, spiking: bool = True) -> None:
        super().__init__(spiking)

    kernel_expression = "real(1)"

    def derivative(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def primitive(self, x: Tensor) -> Tensor:
        return x


class Rect(_AlphaSurrogate):
    """Box of height ``alpha`` and width ``1 / alpha`` (Wu et al. 2018)."""

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(alpha, spiking)

    kernel_expression = "fabs(x) < real(0.5) / alpha ? alpha : real(0)"

    def derivative(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).masked_fill(x.abs() < 0.5 / self.alpha, self.alpha)

    def primitive(self, x: Tensor) -> Tensor:
        return (self.alpha * x + 0.5).clamp(0, 1)


if not TYPE_CHECKING:  # for type checkers a name that is not here is an error

    def __getattr__(name: str) -> Any:
        """Say what comes nearest to a name of SpikingJelly's that is not here."""
        raise missing(__name__, name, __all__)
