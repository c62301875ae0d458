"""The front of a net under ``layer+time:K``: of its first layers no gradient ever stands whole.

The gradient of a layer's output is 32 times as large as its spikes' bits, and largest in the first stage.
BatchNorm over the whole sequence asks for it whole, since the sums over a channel must be there before any of
it can go on. The front, from the images to the first block whose output is at most half as large as the
largest, does without: of its forward pass only the bits between its pieces are kept, and backward runs it
again in ``sweeps``, a few steps of a few samples at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalesnn import layer, neuron, surrogate
from scalesnn.base import Piece
from scalesnn.kernels import packing, spikes
from scalesnn.kernels.unit import Normalisation
from scalesnn.memory import sweeps
from scalesnn.memory.blocks import nothing_changed
from scalesnn.memory.gradients import FEW
from scalesnn.memory.lazy import Kept, Lazy, Options, reader
from scalesnn.memory.mixins import put_before, take_off
from scalesnn.memory.rematerialise import ambient

__all__ = ["Front", "has_front", "install", "remove", "run_front"]

OTHERS = (layer.Conv2d, layer.MaxPool2d, surrogate.SurrogateFunctionBase, nn.Identity)


def install(net: nn.Module) -> None:
    """Have the net's normalisations take part."""
    for module in net.modules():
        if isinstance(module, layer.BatchNorm2d):
            put_before(module, _Norm)


def remove(net: nn.Module) -> None:
    """Undo ``install``."""
    take_off(net, _Norm)


# ---------------------------------------------------------------------------------------------- which part
def has_front(net: nn.Module, options: Options, x_seq: Tensor) -> bool:
    """Whether the first of the net's pieces (see ``base.Piece``) can be its front.

    Not where it would be of no use (few chunks), nor where it would not be exact: hooks that want to see
    every step at once, layers of other kinds, weights that are not there later.
    """
    if options.keep_borders or options.whole or options.at_once or -(-x_seq.shape[0] // options.steps) <= FEW:
        return False
    if x_seq.dim() != 5 or x_seq.requires_grad or not _in_pieces(net):
        return False
    inside = {m for piece in _pieces(net)[:-1] for part in piece.modules for m in part.modules()}
    around = {m for m in net.children() if inside & set(m.modules())}  # stages
    return all(_fits(m, x_seq) for m in inside | around)


def _pieces(net: Any) -> list[Piece]:
    pieces: list[Piece] = net.pieces()
    return pieces


def _in_pieces(net: nn.Module) -> bool:
    """Whether the net's forward is what its ``pieces`` say: no subclass has put another forward before."""
    classes = type(net).__mro__[2:]  # the policy's own two aside
    runs, cut = (next((c for c in classes if name in vars(c)), None) for name in ("forward", "pieces"))
    return runs is not None and cut is not None and issubclass(cut, runs)


def _fits(module: nn.Module, x_seq: Tensor) -> bool:
    if layer.is_watched(module):
        return False
    if isinstance(module, neuron.BaseNode):
        goes_back = isinstance(module.v, Tensor) and module.v.requires_grad
        return not goes_back and not module.store_v_seq and module.fuses(x_seq)
    if isinstance(module, layer.BatchNorm2d):
        return module.training and module.backend != "torch"
    return isinstance(module, OTHERS) or any(True for _ in module.children())


# ---------------------------------------------------------------------------------------------- forward
class Call(NamedTuple):
    """A normalisation at work, and in which piece."""

    norm: Any
    piece: int


class Front:
    """What the forward pass of the front leaves behind.

    Attributes:
        pieces: of the net. options: how time is cut. context: makes the autocast context of forward.
        batch: N. inputs: of the pieces.
        before: the potentials before the sequence, of all its neurons.
        calls: of normalisations, in order. known: their statistics.
        begin: of these a sweep wants the input: ``taken``.
    """

    def __init__(self, pieces: list[Piece], options: Options, x: Tensor) -> None:
        self.pieces, self.options, self.context = pieces, options, ambient(x.device.type)
        self.steps, self.batch = x.shape[:2]
        self.inputs: list[_Input] = []
        self.before = {m: m.v for m in self.modules() if isinstance(m, neuron.BaseNode)}
        self.calls: list[Call] = []
        self.known: dict[Any, sweeps.Statistics] = {}
        self.begin: sweeps.Statistics | None = None
        self.taken: list[Tensor] = []

    def run(self, x: Tensor) -> Tensor:
        """The output of the front, without autograd; ``pieces`` and ``before`` are cut to what has run."""
        largest = 0
        with self.at_work():
            for piece in self.pieces:
                self.inputs.append(_Input(x))
                y = piece.run(x)
                x = y.detach()
                if spikes.is_spikes(y) == 1:
                    spikes.mark_spikes(x, 1, getattr(spikes.marked(y), "scalesnn_bits", None))
                del y  # and its graph
                if x.numel() <= largest // 2:
                    break
                largest = max(largest, x.numel())
        self.pieces = self.pieces[: len(self.inputs)]
        inside = set(self.modules())
        self.before = {node: v for node, v in self.before.items() if node in inside}
        return x

    def again(self, statistics: sweeps.Statistics, x: Tensor) -> Normalisation:
        """A normalisation runs again, in a sweep."""
        if torch.is_grad_enabled():
            if self.begin is statistics:
                self.taken.append(x)
            elif self.begin is None and statistics.lacks is not None:
                statistics.complete(x)
        return statistics.normalisation()

    def modules(self, first: int = 0, end: int | None = None) -> Iterator[nn.Module]:
        """All modules of the pieces from ``first`` to before ``end``."""
        return (m for piece in self.pieces[first:end] for part in piece.modules for m in part.modules())

    @contextmanager
    def at_work(self, kept: Sequence[Tensor] = ()) -> Iterator[None]:
        """The normalisations know of this front, and its inputs have what was ``kept`` of them."""
        norms = [m for m in self.modules() if isinstance(m, _Norm)]
        for norm in norms:
            norm.front = self
        for x, tensor in zip(self.inputs, kept, strict=False):
            x.kept = tensor
        try:
            yield
        finally:
            for norm in norms:
                norm.front = None
            for x, _ in zip(self.inputs, kept, strict=False):
                x.kept = None


class _Input:
    """The input of a piece [T, N, …]: its bits where it is spikes, else the tensor itself."""

    def __init__(self, x: Tensor) -> None:
        known = spikes.bits_of(x) if spikes.is_spikes(x) == 1 else None
        self.is_bits = known is not None and known[1] == 0
        self.kept: Tensor | None = known[0] if known is not None and self.is_bits else x.detach()
        self.shape, self.stride, self.dtype = tuple(x.shape), x.stride(), x.dtype

    def part(self, a: int, b: int, m: int, n: int) -> Tensor:
        """Steps ``a`` to ``b`` of samples ``m`` to ``n``."""
        assert self.kept is not None
        if not self.is_bits:
            return reader(self.kept)(a, b)[:, m:n]
        rows, batch, sample = self.kept[a:b], self.shape[1], self.shape[2:]
        if math.prod(sample) % 32 == 0 and self.stride[1] == math.prod(sample):  # a sample's bits are words
            rows = rows.view(b - a, batch, -1)[:, m:n].flatten(1).contiguous()
            batch, m, n = n - m, 0, n - m
        stride = (self.stride[1] * batch, *self.stride[1:])
        part = packing.unpack(rows, 0, (b - a, batch, *sample), stride, self.dtype)
        return spikes.mark_spikes(
            part if n - m == batch else part[:, m:n], 1, rows if n - m == batch else None
        )


class _Norm:
    """Mixin put before a BatchNorm's class."""

    front: Front | None = None

    def forward(self, x: Tensor, neuron: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
        """As without the mixin; a front that runs for the first time takes note."""
        front: Any = self.front
        if front is not None and self not in front.known:
            front.calls.append(Call(self, len(front.inputs) - 1))
        return super().forward(x, neuron, residual)  # type: ignore[misc]

    def _uses_batch(self) -> bool:
        front = self.front
        return (front is None or self not in front.known) and super()._uses_batch()  # type: ignore[misc]

    def _statistics(self, x: Tensor) -> Normalisation:
        front = self.front
        if front is not None and self in front.known:
            return front.again(front.known[self], x)
        norm: Normalisation = super()._statistics(x)  # type: ignore[misc]
        if front is not None:
            front.known[self] = sweeps.Statistics.of(norm, self)
        return norm


# ---------------------------------------------------------------------------------------------- backward
class _Backward(torch.autograd.Function):
    """Gives autograd the front's output and last potentials as functions of its parameters."""

    @staticmethod
    def forward(ctx: Any, front: Front, outputs: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.front = front
        ctx.save_for_backward(*parameters, *(x.kept for x in front.inputs))  # autograd frees them in time
        for x in front.inputs:
            x.kept = None
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_v: Tensor | None) -> tuple[Tensor | None, ...]:
        front: Front = ctx.front
        saved = list(ctx.saved_tensors)
        parameters, inputs = saved[: -len(front.inputs)], saved[-len(front.inputs) :]
        of_y = None if grad is None else reader(grad)
        if isinstance(of_y, Kept):
            of_y.make_from()
        elif isinstance(grad, Lazy):  # it is read many times
            of_y = reader(grad.whole())
        of_last = dict(zip(front.before, of_v, strict=True))
        with nothing_changed(nn.ModuleList(front.modules())), front.at_work(inputs):
            return None, None, *sweeps.gradients(front, of_y, of_last, parameters)


def run_front(net: nn.Module, options: Options, x_seq: Tensor) -> tuple[Tensor, list[Piece]]:
    """The output of the net's front, and the pieces that come after it."""
    pieces = _pieces(net)
    front = Front(pieces[:-1], options, x_seq)
    y = front.run(x_seq)
    bits = getattr(spikes.marked(y), "scalesnn_bits", None)
    parameters = dict.fromkeys(p for m in front.modules() for p in m.parameters(False) if p.requires_grad)
    last = [torch.as_tensor(node.v).detach() for node in front.before]
    y, *last = _Backward.apply(front, [y, *last], *parameters)
    for node, v in zip(front.before, last, strict=True):
        node.v = v.detach() if options.detach else v
    if bits is not None:
        spikes.mark_spikes(y, 1, bits)
    return y, pieces[len(front.pieces) :]
