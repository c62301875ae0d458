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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalesnn.kernels import launch, normalisation, ops
from scalesnn.kernels.unit import neuron_arguments
from scalesnn.memory.source import Source, Stored, spans

__all__ = ["StreamedUnit", "Unit", "joined"]

Neuron = tuple[Any, ...]  # ``kernels.unit.neuron_arguments``
NO_NEURON: Neuron = neuron_arguments(None, 0.0, False, False)
BITS = 7  # the place of ``with_bits`` among them, where ``unit_backward`` has whether v needs a gradient


@dataclass(frozen=True)
class Unit:
    """A unit up to its neuron.

    Attributes:
        source: makes the convolution's output.
        steps, detach: of ``deferral.Streaming``.
        statistics: what gradients through BatchNorm's statistics need: 1 / (variance + eps) [C], how many
            values there were, and the process group; None: they are constants.
        addend: makes the residual.
        apart: normalisation and neuron were called one by one; in a short dtype what is between is rounded.
    """

    source: Source
    steps: int
    detach: bool
    statistics: tuple[Tensor, Tensor, str] | None = None
    addend: Source | Stored | None = None
    apart: bool = False

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """The spans of time-steps."""
        return spans(self.source.conv.out_shape[0], self.steps)

    @cached_property
    def affine(self) -> tuple[Tensor | None, ...]:
        """Mean, scale and bias of the normalisation."""
        return (None, None, None) if self.source.affine is None else tuple(self.source.affine)

    def values(self, y: Tensor, a: int, b: int) -> Tensor:
        """What the neuron takes in a chunk whose convolution's output is ``y``."""
        y = y if self.source.affine is None else ops.normalise(y, self.source.affine)
        return y if self.addend is None else y + self.addend.steps(a, b)

    def forward(self, a: int, b: int, v: Tensor | None, decay: Tensor | None, neuron: Neuron) -> Any:
        """``ops.unit`` of a chunk."""
        y, none = self.source.output(a, b), (None, None, None)
        state = (*none, v, decay, None, None, 1)
        if self.apart:
            return ops.unit(self.values(y, a, b), *none, None, *state, *neuron, "")
        added = None if self.addend is None else self.addend.steps(a, b)
        return ops.unit(y, *self.affine, added, *state, *neuron, "")

    def backward(
        self, grads: tuple[Tensor | None, ...], a: int, b: int, state: tuple[Any, ...], neuron: Neuron
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``ops.unit_backward`` of a chunk: dL/dy, sums, dL/dv before it.

        Args:
            grads: of spikes and potentials. state: v before the chunk, and decay.
            neuron: with whether v needs a gradient in the place of ``with_bits``.
        """
        y = self.source.output(a, b, hold=a == 0)
        if self.apart:
            none = (None, None, None, None, None)
            x = self.values(y, a, b)
            part, of_decay, of_start = ops.unit_backward(*grads, x, *none, *state, 1, *neuron)
            sums = ops.unit_backward(part, None, y, *self.affine, *none[:4], 1, *NO_NEURON)[1]
            sums[2, 0] = of_decay[2].sum()
            return part, sums, of_start
        bits = self.addend.bits(a, b, y) if isinstance(self.addend, Stored) else None
        added = None if self.addend is None or bits is not None else self.addend.steps(a, b)
        return ops.unit_backward(*grads, y, *self.affine, added, bits, *state, 1, *neuron)


class StreamedUnit(torch.autograd.Function):
    """The unit on tensors that autograd knows.

    Args:
        unit: how it is made. neuron: its arguments, or a function that makes a deferred output.
        x, weight, bias: of the convolution. scale, shift: of the normalisation. residual: what is added.
        v: potentials before the first step; None: as ``neuron`` says. decay: 1 / tau where it is learned.

    Returns:
        spikes [T, N, C, H, W], the last potentials [N, C, H, W], bits; or the deferred output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unit: Unit,
        neuron: Neuron | Callable[[], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        v: Tensor | None,
        decay: Tensor | None,
    ) -> Any:
        outputs = neuron() if callable(neuron) else _forward(unit, neuron, v, decay)
        source = unit.source
        kept = x if source.conv.form is None else source.kept
        addend, added = (None, []) if unit.addend is None else unit.addend.parts()
        ctx.save_for_backward(kept, weight, bias, source.affine, v, decay, *added)
        ctx.versions = (kept._version, weight._version)  # hooks on saved tensors keep torch from looking
        ctx.unit = (source.conv, addend, unit.steps, unit.detach, unit.statistics, unit.apart)
        ctx.neuron = NO_NEURON if callable(neuron) else neuron
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, scale, shift, decay)]
        ctx.set_materialize_grads(False)
        if not callable(neuron):
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, of_v: Tensor | None = None, _: Any = None) -> Any:
        kept, weight, bias, affine, v, decay, *added = ctx.saved_tensors
        if ctx.versions != (kept._version, weight._version):
            raise RuntimeError("a tensor that backward needs has been modified by an inplace operation")
        if of_out is None and of_v is None:
            return (None,) * 10
        conv, addend, steps, detach, statistics, apart = ctx.unit
        source = Source(conv, kept, conv.values_of(weight), conv.values_of(bias), affine)
        unit = Unit(source, steps, detach, statistics, None if addend is None else addend(*added), apart)
        *need, need_scale, need_shift, need_residual, need_v, need_decay = ctx.needs_input_grad[2:]
        of_y, sums, of_start = _through_neuron(unit, ctx.neuron, of_out, of_v, v, decay, need_v)
        of_shift, of_scale, of_decay = sums[0], sums[1], sums[2].sum()
        ours = of_y is not of_out and not need_residual
        of_inputs = _through_convolution(unit, of_y, sums, ours, need, ctx.dtypes[:2])
        return (
            *(None, None, *of_inputs),
            of_scale.to(ctx.dtypes[2]) if need_scale else None,
            of_shift.to(ctx.dtypes[3]) if need_shift else None,
            of_y if need_residual else None,
            of_start if need_v else None,
            of_decay.to(ctx.dtypes[4]) if need_decay else None,
        )


def _forward(unit: Unit, neuron: Neuron, v: Tensor | None, decay: Tensor | None) -> tuple[Tensor, ...]:
    """Spikes, potentials and bits, chunk by chunk."""
    out: Tensor | None = None
    bits = []
    for a, b in unit.chunks:
        part, v_out, words = unit.forward(a, b, v, decay, neuron)
        out = joined(out, part, a, b, unit)
        bits.append(words)
        v = v_out if neuron[0] else None
        del part
    assert out is not None
    return out, v_out, torch.cat(bits) if len(bits) > 1 else bits[0]


def _through_neuron(
    unit: Unit,
    neuron: Neuron,
    of_out: Tensor | None,
    of_v: Tensor | None,
    v: Tensor | None,
    decay: Tensor | None,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradients of spikes and potentials to dL/dy, y being what the neuron takes; its float64 sums
    [3, C] (of dL/dy, of dL/dy (x - mean), of the gradient of decay); and dL/dv before the first step."""
    fires, chunks, borders = neuron[0] > 0, unit.chunks, [v]
    if not fires and unit.source.affine is None:
        assert of_out is not None
        return of_out, of_out.new_zeros(3, 1, dtype=torch.float64), None
    if fires:
        without_bits = (*neuron[:BITS], False, *neuron[BITS + 1 :])
        for a, b in chunks[:-1]:
            borders.append(unit.forward(a, b, borders[-1], decay, without_bits)[1])
    of_y, sums, of_before = None if fires else of_out, None, of_v
    for index in reversed(range(len(chunks))):
        a, b = chunks[index]
        needs_v = fires and (a > 0 or need_v)
        part, of_channels, of_before = unit.backward(
            (None if of_out is None else of_out[a:b], of_before if fires else None),
            *(a, b, (borders[index] if fires else None, decay)),
            (*neuron[:BITS], needs_v, *neuron[BITS + 1 :]),
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
    unit: Unit, of_y: Tensor, sums: Tensor, ours: bool, need: list[bool], dtypes: list[Any]
) -> list[Tensor | None]:
    """From dL/dy through normalisation and convolution to the gradients of its input, weight and bias. Under
    synchronised BatchNorm the sums are added up over the ranks.

    Args:
        ours: ``of_y`` may be written over.
    """
    found: list[Tensor | None] = [None, None, None]
    if not any(need):
        return found
    coefficients: Tensor | None = None
    if unit.statistics is not None:
        inverse_variance, count, group = unit.statistics
        share = normalisation.all_reduce(sums[:2], group) / count
        coefficients = torch.stack([share[0], share[1] * inverse_variance])
    for a, b in unit.chunks:
        part = of_y[a:b]
        if unit.source.affine is not None:
            y, (mean, scale, _) = unit.source.output(a, b), unit.affine
            if ours:
                normalisation.normalise_backward_(part, y, mean, scale, coefficients)
            else:
                part = normalisation.normalise_backward(part, y, mean, scale, coefficients)
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
