"""The streamed unit: convolution → BatchNorm → (+ residual) → neuron as one autograd Function over chunks of
K time-steps. It keeps bits, and makes the convolution again in backward (docs/memory.md).

    forward    each chunk: the convolution; normalise, charge, fire, reset → spikes, bits
    backward   each chunk: the convolution; v before the next chunk
               each chunk, the last first: the convolution; dL/dy, and its sums over channels
               each chunk: the convolution; dL/dx, added-up gradients of the weight, that of the input
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalesnn.kernels import launch, normalisation, ops
from scalesnn.kernels.records import NO_NEURON, NeuronParameters, UnitInputs
from scalesnn.memory.source import Source, Stored, spans

__all__ = ["Firing", "StreamedUnit", "Unit", "joined"]


class Firing(NamedTuple):
    """A unit's neuron, and its potentials ``v_init`` before the first step where they are one number."""

    neuron: NeuronParameters = NO_NEURON
    v_init: float = 0.0


@dataclass(frozen=True)
class Unit:
    """A unit up to its neuron.

    Attributes:
        source: makes the convolution's output.
        steps, detach: of ``deferral.Streaming``.
        statistics, group: of the normalisation, see ``records.UnitInputs``.
        addend: makes the residual.
        apart: normalisation and neuron were called one by one; in a short dtype what is between is rounded.
    """

    source: Source
    steps: int
    detach: bool
    statistics: Tensor | None = None
    group: str = ""
    addend: Source | Stored | None = None
    apart: bool = False

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """The spans of time-steps."""
        return spans(self.source.conv.out_shape[0], self.steps)

    def values(self, y: Tensor, a: int, b: int) -> Tensor:
        """What the neuron takes in a chunk whose convolution's output is ``y``."""
        y = y if self.source.affine is None else ops.normalise(y, self.source.affine)
        return y if self.addend is None else y + self.addend.steps(a, b)

    def forward(
        self, a: int, b: int, v: Tensor | None, decay: Tensor | None, firing: Firing, with_bits: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``ops.unit`` of a chunk."""
        y = self.source.output(a, b)
        if self.apart:
            u = UnitInputs(self.values(y, a, b))
        else:
            added = None if self.addend is None else self.addend.steps(a, b)
            u = UnitInputs(y, self.source.affine, residual=added)
        fires = firing.neuron.fires
        return ops.unit(
            u._replace(
                v=v, decay=decay, v_init=firing.v_init, with_bits=with_bits and fires, neuron=firing.neuron
            )
        )

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None],
        a: int,
        b: int,
        state: tuple[Tensor | None, Tensor | None],
        firing: Firing,
        with_v: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``ops.unit_backward`` of a chunk: dL/dy, rows of sums, dL/dv before it.

        Args:
            grads: of spikes and potentials. state: v before the chunk, and decay.
            with_v: dL/dv is asked for.
        """
        y, (v, decay) = self.source.output(a, b, hold=a == 0), state
        neuron = UnitInputs(y, v=v, decay=decay, v_init=firing.v_init, neuron=firing.neuron)
        if self.apart:
            part, of_decay, of_start = ops.unit_backward(
                *grads, neuron._replace(x=self.values(y, a, b)), with_v
            )
            rows = ops.unit_backward(part, None, UnitInputs(y, self.source.affine))[1]
            rows[:, 2] = 0
            rows[0, 2, 0] = of_decay[:, 2].sum()
            return part, rows, of_start
        bits = self.addend.bits(a, b, y) if isinstance(self.addend, Stored) else None
        added = None if self.addend is None or bits is not None else self.addend.steps(a, b)
        unit = neuron._replace(affine=self.source.affine, residual=added, residual_bits=bits)
        return ops.unit_backward(*grads, unit, with_v)


class StreamedUnit(torch.autograd.Function):
    """The unit on tensors that autograd knows.

    Args:
        unit: how it is made. firing: its neuron, or a function that makes a deferred output.
        x, weight, bias: of the convolution. scale, shift: weight and bias of the normalisation, which are in
            ``unit``'s ``affine``. residual: what is added.
        v: potentials before the first step; None: as ``neuron`` says. decay: 1 / tau where it is learned.

    Returns:
        spikes [T, N, C, H, W], the last potentials [N, C, H, W], bits; or the deferred output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unit: Unit,
        firing: Firing | Callable[[], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        v: Tensor | None,
        decay: Tensor | None,
    ) -> Any:
        outputs = firing() if callable(firing) else _forward(unit, firing, v, decay)
        source = unit.source
        kept = x if source.conv.form is None else source.kept
        addend, added = (None, []) if unit.addend is None else unit.addend.parts()
        ctx.save_for_backward(kept, weight, bias, source.affine, unit.statistics, v, decay, *added)
        ctx.versions = (kept._version, weight._version)  # hooks on saved tensors keep torch from looking
        ctx.unit = (source.conv, addend, unit.steps, unit.detach, unit.group, unit.apart)
        ctx.firing = Firing() if callable(firing) else firing
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, scale, shift, decay)]
        ctx.set_materialize_grads(False)
        if not callable(firing):
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, of_v: Tensor | None = None, _: Any = None) -> Any:
        kept, weight, bias, affine, statistics, v, decay, *added = ctx.saved_tensors
        if ctx.versions != (kept._version, weight._version):
            raise RuntimeError("a tensor that backward needs has been modified by an inplace operation")
        if of_out is None and of_v is None:
            return (None,) * 10
        conv, addend, steps, detach, group, apart = ctx.unit
        source = Source(conv, kept, conv.values_of(weight), conv.values_of(bias), affine)
        addend = None if addend is None else addend(*added)
        unit = Unit(source, steps, detach, statistics, group, addend, apart)
        *need, need_scale, need_shift, need_residual, need_v, need_decay = ctx.needs_input_grad[2:]
        of_y, rows, of_start = _through_neuron(unit, ctx.firing, of_out, of_v, v, decay, need_v)
        ours = of_y is not of_out and not need_residual
        coefficients = of_scale = of_shift = None
        if affine is not None:
            dtype = ctx.dtypes[2] or ctx.dtypes[3] or affine.dtype
            coefficients, of_scale, of_shift = normalisation.channel_gradients(
                rows, affine, statistics, 1, group if any(need) else "", dtype, need_scale, need_shift
            )
            coefficients = None if statistics is None else coefficients
        of_inputs = _through_convolution(unit, of_y, coefficients, ours, need, ctx.dtypes[:2])
        return (
            *(None, None, *of_inputs),
            of_scale if need_scale else None,
            of_shift if need_shift else None,
            of_y if need_residual else None,
            of_start if need_v else None,
            rows[:, 2].sum().to(ctx.dtypes[4]) if need_decay else None,
        )


def _forward(unit: Unit, firing: Firing, v: Tensor | None, decay: Tensor | None) -> tuple[Tensor, ...]:
    """Spikes, potentials and bits, chunk by chunk."""
    out: Tensor | None = None
    bits = []
    for a, b in unit.chunks:
        part, v_out, words = unit.forward(a, b, v, decay, firing, with_bits=True)
        out = joined(out, part, a, b, unit)
        bits.append(words)
        v = v_out if firing.neuron.fires else None
        del part
    assert out is not None
    return out, v_out, torch.cat(bits) if len(bits) > 1 else bits[0]


def _through_neuron(
    unit: Unit,
    firing: Firing,
    of_out: Tensor | None,
    of_v: Tensor | None,
    v: Tensor | None,
    decay: Tensor | None,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradients of spikes and potentials to dL/dy, y being what the neuron takes; its sums as
    ``ops.unit_backward`` has them; and dL/dv before the first step."""
    fires, chunks, borders = firing.neuron.fires, unit.chunks, [v]
    if not fires and unit.source.affine is None:
        assert of_out is not None
        return of_out, of_out.new_zeros(1, 3, 1, dtype=torch.float64), None
    if fires:
        for a, b in chunks[:-1]:
            borders.append(unit.forward(a, b, borders[-1], decay, firing, with_bits=False)[1])
    of_y, sums, of_before = None if fires else of_out, None, of_v
    for index in reversed(range(len(chunks))):
        a, b = chunks[index]
        needs_v = fires and (a > 0 or need_v)
        part, of_channels, of_before = unit.backward(
            (None if of_out is None else of_out[a:b], of_before if fires else None),
            *(a, b, (borders[index] if fires else None, decay)),
            *(firing, needs_v),
        )
        sums = of_channels if sums is None else sums + of_channels
        of_y = joined(of_y, part, a, b, unit) if fires else of_y
        del part
        if unit.detach and a > 0:
            of_before = None
    assert of_y is not None
    assert sums is not None
    return of_y, sums, of_before


def _through_convolution(
    unit: Unit,
    of_y: Tensor,
    coefficients: Tensor | None,
    ours: bool,
    need: list[bool],
    dtypes: list[Any],
) -> list[Tensor | None]:
    """From dL/dy through normalisation and convolution to the gradients of its input, weight and bias.

    Args:
        coefficients: of ``normalisation.channel_gradients``.
        ours: ``of_y`` may be written over.
    """
    found: list[Tensor | None] = [None, None, None]
    if not any(need):
        return found
    for a, b in unit.chunks:
        part = of_y[a:b]
        if unit.source.affine is not None:
            y, affine = unit.source.output(a, b), unit.source.affine
            if ours:
                normalisation.normalise_backward_(part, y, affine, coefficients)
            else:
                part = normalisation.normalise_backward(part, y, affine, coefficients)
            del y
        for start, end in unit.source.pieces(a, b):
            of_x, *of_parameters = unit.source.gradients(part[start - a : end - a], start, end, need)
            found[0] = None if of_x is None else joined(found[0], of_x, start, end, unit)
            del of_x
            for i, value in enumerate(of_parameters):
                if value is not None:
                    value, before = value.to(dtypes[i]), found[i + 1]
                    found[i + 1] = value if before is None else before.add_(value)
        del part
    return found


def joined(whole: Tensor | None, part: Tensor, a: int, b: int, unit: Unit) -> Tensor:
    """The sequence of all steps with ``part`` as those from ``a`` to ``b``."""
    total = unit.source.conv.shape[0]
    if b - a == total:
        return part
    if whole is None:
        whole = launch.empty(launch.dense(part), total)
    whole[a:b] = part
    return whole
