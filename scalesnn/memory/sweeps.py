"""Gradients of the front of a net (see ``front``): backward through all its time-steps, several times.

A sweep runs pieces of the front again, a chunk of K steps of some samples at a time, the last steps first.
Potentials at chunk borders come again, and their gradients are carried back over them. Piece by piece, from
the last:

    A sweep from the piece to the end of the front, in which the statistics of the piece's own normalisations
    count as constants: the sums over a channel, Σ dL/dy and Σ dL/dy (x - mean), which are the gradients of
    bias and weight.

    For each of its normalisations, from the last: what dL/dx lacked, since x makes the statistics, is
    -a - b (x - mean), with a and b from these sums. A sweep through the piece alone begins with that, and
    adds to the sums of the normalisations before.

From then on dL/dx is whole in sweeps from pieces before. With the first piece's come the gradients of all
other parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from scalesnn.kernels import normalisation, spikes
from scalesnn.kernels.unit import Normalisation
from scalesnn.memory.counting import alike
from scalesnn.memory.gradients import Borders
from scalesnn.memory.lazy import Chunk, spans

if TYPE_CHECKING:
    from scalesnn.memory.front import Front

__all__ = ["Statistics", "gradients"]

GROUPS = 4  # of samples, at most
Potentials = dict[Any, Any]  # of neurons: tensors, or one number for all


# ---------------------------------------------------------------------------------------------- statistics
@dataclass
class Statistics:
    """Of a normalisation: mean and variance of the forward pass, and what sweeps have found.

    Attributes:
        mean, inverse_variance: [C]. count: of values in a channel, over all ranks of ``group``.
        weight, bias: [C], leaves of autograd.
        lacks: [2, C], a and b of what the gradient of x lacks. None: not known yet.
    """

    mean: Tensor
    inverse_variance: Tensor
    count: Tensor
    weight: Tensor
    bias: Tensor
    group: str = ""
    lacks: Tensor | None = None

    @classmethod
    def of(cls, norm: Normalisation, module: Any) -> Statistics:
        """Of a normalisation that takes the batch's statistics."""
        assert norm.inverse_variance is not None
        assert norm.count is not None
        one = torch.ones_like(norm.mean)
        weight = one if module.weight is None else module.weight.detach().to(one.dtype)
        bias = one * 0 if module.bias is None else module.bias.detach().to(one.dtype)
        leaves = (weight.clone().requires_grad_(), bias.clone().requires_grad_())
        return cls(norm.mean.detach(), norm.inverse_variance, norm.count, *leaves, norm.group)

    @property
    def inverse_std(self) -> Tensor:
        """[C], in the dtype of ``mean``."""
        return self.inverse_variance.sqrt().to(self.mean.dtype)

    def normalisation(self) -> Normalisation:
        """As in the forward pass, the statistics as constants."""
        return Normalisation(self.mean, self.weight * self.inverse_std, self.bias)

    def know(self, of_weight: Tensor, of_bias: Tensor) -> None:
        """The gradients over the whole sequence are known, [C] in float64: this rank's share."""
        of_weight, of_bias = normalisation.all_reduce(torch.stack([of_weight, of_bias]), self.group)
        inverse_std = self.inverse_std.double()
        scale = self.weight.detach().double() * inverse_std / self.count
        self.lacks = torch.stack([of_bias * scale, of_weight * inverse_std * scale])

    def complete(self, x: Tensor) -> None:
        """Have the gradient of ``x`` get what it lacks."""
        x, times = once(x)
        if x.requires_grad:
            # not x itself: a cycle would end late; and the hook lasts longer than the values are needed
            held = [x.detach()]
            x.register_hook(lambda grad: self._plus_lack(grad, held.pop(), times))

    def lack(self, x: Tensor) -> tuple[GradientEdge, Tensor]:
        """``x`` to autograd, and what its gradient lacks."""
        x, times = once(x)
        values = x.detach()
        return get_gradient_edge(x), self._plus_lack(torch.zeros_like(values), values, times)

    def _plus_lack(self, grad: Tensor, x: Tensor, times: int) -> Tensor:
        assert self.lacks is not None
        one, lacks = torch.ones_like(self.mean), self.lacks * times
        if x.dim() == 4:
            return normalisation.normalise_backward(grad[None], x[None], self.mean, one, lacks)[0]
        return normalisation.normalise_backward(grad, x, self.mean, one, lacks)


def once(x: Tensor) -> tuple[Tensor, int]:
    """The one step [N, …] that a sequence repeats, and how often; else the sequence and 1."""
    step = getattr(spikes.marked(x), "scalesnn_once", None)
    return (x, 1) if step is None else (step, x.shape[0])


# ---------------------------------------------------------------------------------------------- sweeps
class _Sweep(NamedTuple):
    """Through which pieces, from what.

    Attributes:
        first, end: the pieces from one to before the other.
        of_y: the gradient of their output, by chunks. of_last: of the potentials after the last step.
        begin: or, where dL/dx of this normalisation lacks something, with that.
    """

    first: int
    end: int
    of_y: Chunk | None = None
    of_last: Potentials | None = None
    begin: Statistics | None = None


def gradients(
    front: Front, of_y: Chunk | None, of_last: Potentials, parameters: list[Tensor]
) -> list[Tensor]:
    """Of the front's parameters.

    Args:
        of_y: the gradient of its output, by chunks. of_last: of the potentials after the last step.
    """
    found: dict[Tensor, Tensor] = {}
    for statistics in front.known.values():
        statistics.lacks = None
    of_norms = {p for call in front.calls for p in call.norm.parameters()}
    others = [p for p in parameters if p not in of_norms]
    of_later_pieces = set(others) - {p for part in front.pieces[0].modules for p in part.parameters()}
    for number in reversed(range(len(front.pieces))):
        calls = [call for call in front.calls if call.piece == number]
        targets = [t for c in calls for t in (front.known[c.norm].weight, front.known[c.norm].bias)]
        targets += others if number == 0 else []
        sweep = _Sweep(number, len(front.pieces), of_y, of_last)
        sums = dict(zip(targets, _sums(front, sweep, targets), strict=True))
        for call in reversed(calls):
            statistics = front.known[call.norm]
            of_weight, of_bias = sums.pop(statistics.weight), sums.pop(statistics.bias)
            statistics.know(of_weight, of_bias)
            found |= {call.norm.weight: of_weight, call.norm.bias: of_bias}
            before = [t for t in sums if t not in of_later_pieces]
            sweep = _Sweep(number, number + 1, begin=statistics)
            for target, more in zip(before, _sums(front, sweep, before), strict=True):
                sums[target] += more
        found |= sums
    return [found[p].to(p.dtype) for p in parameters]


def _sums(front: Front, sweep: _Sweep, targets: list[Tensor]) -> list[Tensor]:
    """The gradients of ``targets``."""
    # the sums over a channel are of many values
    sums = [torch.zeros_like(t, dtype=torch.float64 if t.dim() == 1 else t.dtype) for t in targets]
    if not targets:
        return sums
    inside = set(front.modules(sweep.first, sweep.end))
    nodes = [node for node in front.before if node in inside]
    chunks = list(spans(front.steps, front.options.steps))
    groups = next(g for g in range(min(GROUPS, front.batch), 0, -1) if front.batch % g == 0)
    size = front.batch // groups
    for group in alike(range(groups)):
        samples = (group * size, group * size + size)
        start = _of_samples(front.before, nodes, samples)
        borders = Borders(partial(_forward, front, sweep, samples), start, chunks, sparse=True)
        of_v = _of_samples(sweep.of_last or {}, nodes, samples)
        for index in alike(range(len(chunks))[::-1], unlike=1):
            chunk = _Chunk(front, sweep, (*chunks[index], *samples), borders(index), is_first=index == 0)
            found, of_v = chunk.gradients(of_v, targets)
            for total, value in zip(sums, found, strict=True):
                if value is not None:
                    total += value
            if front.options.detach:
                of_v = {}
    return sums


def _of_samples(values: Potentials, nodes: list[Any], samples: tuple[int, int]) -> Potentials:
    found = {node: values[node] for node in nodes if values.get(node) is not None}
    return {n: v[slice(*samples)] if isinstance(v, Tensor) else v for n, v in found.items()}


def _run(front: Front, sweep: _Sweep, part: tuple[int, int, int, int], before: Potentials) -> Tensor:
    """The output of a chunk; the potentials after it are the neurons' own."""
    for node, v in before.items():
        node.v = v
    x = front.inputs[sweep.first].part(*part)
    for piece in front.pieces[sweep.first : sweep.end]:
        x = piece.run(x)
    return x


def _forward(
    front: Front, sweep: _Sweep, samples: tuple[int, int], a: int, b: int, before: Potentials
) -> Potentials:
    """The potentials after steps ``a`` to ``b``."""
    with torch.no_grad(), front.context():
        _run(front, sweep, (a, b, *samples), before)
    return {node: node.v for node in before}


class _Chunk:
    """Steps ``a`` to ``b`` of samples ``m`` to ``n``, to autograd: ``part`` is (a, b, m, n).

    Args:
        before: the potentials before it. is_first: of these no gradient is asked for.
    """

    def __init__(
        self, front: Front, sweep: _Sweep, part: tuple[int, int, int, int], before: Potentials, is_first: bool
    ) -> None:
        before = {n: v.detach() if isinstance(v, Tensor) else v for n, v in before.items()}
        self.before = {} if is_first else {n: v.requires_grad_() for n, v in before.items()}
        front.begin = sweep.begin
        with torch.enable_grad(), front.context():
            y = _run(front, sweep, part, before)
        # of outputs only the edges are kept: their values are not needed
        self.after = {n: get_gradient_edge(n.v) for n in before if n.v.requires_grad}
        for node in before:
            node.v = 0.0
        self.edges: list[tuple[GradientEdge, Tensor]] = []
        if sweep.begin is not None:
            self.edges.append(sweep.begin.lack(front.taken.pop()))
        elif sweep.of_y is not None:
            a, b, m, n = part
            self.edges.append((get_gradient_edge(y), sweep.of_y(a, b)[:, m:n]))

    def gradients(self, of_v: Potentials, targets: list[Tensor]) -> tuple[list[Tensor | None], Potentials]:
        """Of the targets, and of the potentials before the chunk, from those after it."""
        edges = [*self.edges, *((self.after[node], g) for node, g in of_v.items() if node in self.after)]
        if not edges:
            return [None] * len(targets), {}
        outputs, given = zip(*edges, strict=True)
        found = torch.autograd.grad(outputs, [*targets, *self.before.values()], given, allow_unused=True)
        carried = zip(self.before, found[len(targets) :], strict=True)
        return list(found[: len(targets)]), {node: g for node, g in carried if g is not None}
