"""Outputs of convolutions that are not made: a normalisation and a neuron that find one run the streamed unit
(``unit``), everything else gets an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scalesnn.kernels import normalisation, spikes
from scalesnn.kernels.deferred import Deferred
from scalesnn.kernels.kept import keep
from scalesnn.kernels.unit import NeuronParameters, Normalisation, fused_unit
from scalesnn.layer import Conv2d
from scalesnn.memory.source import Convolution, Source, Stored, is_scattered
from scalesnn.memory.unit import Firing, StreamedUnit, Unit, joined

__all__ = ["Output", "Streaming"]

SHORT = (torch.bfloat16, torch.float16)


@dataclass
class Streaming:
    """What a convolution has as its ``policy``.

    Attributes:
        steps: K; 0: all steps at once. detach: no gradient goes back over the border of a chunk.
        paused: outputs are made as without a policy.
    """

    steps: int = 0
    detach: bool = False
    paused: bool = False

    def defer(self, module: Conv2d, x: Tensor) -> Tensor | None:
        """The output for ``x`` [T, N, C, H, W], deferred; None: torch has to make it."""
        if self.paused or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        x = x.plain() if isinstance(x, Deferred) else x
        kept, form = keep(x)
        conv = Convolution.of(module, x, form)
        weight, bias = conv.values_of(module.weight), conv.values_of(module.bias)
        assert weight is not None
        source = Source(conv, kept.detach(), weight, bias, x=x.detach())
        inputs = (x, module.weight, module.bias, None, None, None)
        output = partial(Output, Unit(source, self.steps, self.detach), module, inputs)
        deferred: Tensor = StreamedUnit.apply(output.args[0], output, *inputs, None, None)
        return deferred

    def paused_in(self, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
        """``forward(x)`` without the policy."""
        self.paused = True
        try:
            return forward(x)
        finally:
            self.paused = False


class Output(Deferred):
    """The output of a convolution, normalised or not, with a residual or without.

    Attributes:
        of: what makes it. module: the convolution.
        inputs: of ``StreamedUnit``, from x to the residual.
    """

    of: Unit
    module: Conv2d
    inputs: tuple[Tensor | None, ...]

    @staticmethod
    def __new__(cls, of: Unit, module: Conv2d, inputs: tuple[Tensor | None, ...]) -> Any:
        conv = of.source.conv
        out = Deferred.__new__(cls, conv.out_shape, conv.out_stride, of.source.kept, conv.dtype)
        out.of, out.module, out.inputs = of, module, inputs
        return out

    def another(self) -> Output:
        return Output(self.of, self.module, self.inputs)

    def takes(self, norm: bool) -> bool:
        return not norm or (self.of.source.affine is None and self.of.addend is None)

    def values(self) -> Tensor:
        out: Tensor | None = None
        for a, b in self.of.chunks:
            out = joined(out, self.of.values(self.of.source.output(a, b), a, b), a, b, self.of)
        assert out is not None
        return out

    def statistics(self) -> normalisation.Sums:
        """Added up over the chunks, of which the first comes last and is held for the unit."""
        chunks, source = list(reversed(self.of.chunks)), self.of.source
        with torch.no_grad():
            sums = [normalisation.statistics(source.output(a, b, hold=a == 0)) for a, b in chunks]
        if len(sums) == 1:
            return sums[0]
        total, *others = map(normalisation.packed_sums, sums)
        for other in others:
            total += other
        return normalisation.Sums(total)

    def plus(self, other: Tensor) -> Tensor | None:
        fits = other.shape == self.shape and other.dtype == self.dtype and other.device == self.device
        if not fits or not self.is_normalised_only() or self.hooked:
            return None
        total = self._with_residual(other)
        deferred: Tensor = total.run(partial(Output, total.of, total.module, total.inputs))
        return deferred

    def is_normalised_only(self) -> bool:
        """Whether it is normalised, and nothing else has been done."""
        return self.of.source.affine is not None and self.of.addend is None and self._plain is None

    def unit(
        self,
        neuron: NeuronParameters | None,
        v: Tensor | float,
        v_every_step: bool,
        norm: Normalisation | None,
        decay: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if v_every_step:  # those potentials are larger than all that is saved here
            return fused_unit(self.plain(), neuron, v, True, norm, decay)
        out = self if norm is None else self._normalised(norm)
        nothing = torch.empty(0)
        if neuron is None:
            if out.of.addend is not None:
                return out.run(Firing())[0], nothing
            return out.run(partial(Output, out.of, out.module, out.inputs)), nothing
        if norm is None and out.of.source.affine is not None and self.dtype in SHORT:
            out = Output(replace(out.of, apart=True), out.module, out.inputs)
        firing = Firing(neuron, 0.0 if isinstance(v, Tensor) else float(v))
        fired, v_out, bits = out.run(firing, v if isinstance(v, Tensor) else None, decay)
        return spikes.mark_spikes(fired, 1, bits), v_out

    def run(self, firing: Any, v: Tensor | None = None, decay: Tensor | None = None) -> Any:
        """``StreamedUnit``, inside of the module's call where ZeRO-3 gathers its weight for that."""
        if not is_scattered(self.module.weight):
            return StreamedUnit.apply(self.of, firing, *self.inputs, v, decay)
        module, (x, _, _, *rest) = self.module, self.inputs

        def unit(x: Tensor) -> Any:
            return StreamedUnit.apply(self.of, firing, x, module.weight, module.bias, *rest, v, decay)

        return module(x, instead=unit)

    def _normalised(self, norm: Normalisation) -> Output:
        # clones: ZeRO-3 and FSDP2 take a parameter away after the module's call
        scale, shift = (None if p is None else p.clone() for p in (norm.weight, norm.bias))
        source = self.of.source.normalised(norm.affine)
        of = replace(self.of, source=source, statistics=norm.statistics, group=norm.group)
        out = Output(of, self.module, (*self.inputs[:3], scale, shift, None))
        return out if norm.residual is None else out._with_residual(norm.residual)

    def _with_residual(self, residual: Tensor) -> Output:
        addend: Source | Stored
        if isinstance(residual, Output) and residual.is_normalised_only():
            addend = residual.of.source
        else:
            residual = residual.plain() if isinstance(residual, Deferred) else residual
            kept, form = keep(residual)
            addend = Stored(form, kept.detach(), residual.detach())
        return Output(replace(self.of, addend=addend), self.module, (*self.inputs[:5], residual))
