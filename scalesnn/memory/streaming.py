"""Policy ``time:K`` with BatchNorm over the whole sequence: layer after layer, each in chunks of K steps.

A convolution makes no output but a ``Lazy`` one. BatchNorm reads it chunk by chunk for the statistics, the
unit once more for the spikes, which stay as bits; backward makes the chunks again, last to first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn import layer
from scalesnn.kernels import ops, spikes
from scalesnn.memory.lazy import Chunk, Lazy, chunk_of, spans, strides_of_sequence
from scalesnn.memory.rematerialise import KeptSpikes, ambient

if TYPE_CHECKING:
    from scalesnn.memory.policy import Policy

__all__ = ["install", "install_pools", "remove", "stream"]

Options = tuple[int, bool, bool]  # steps, detach, keep the potentials at chunk borders
Geometry = tuple[list[int], list[int], list[int], list[int], bool]
LEAN: Options = (4, False, False)  # a gradient in chunks of 4 steps
_active: list[Options] = []


def install(net: nn.Module) -> None:
    """Have the net's convolutions and max-pools take part."""
    for module in net.modules():
        for kind, mixin in ((layer.Conv2d, _StreamedConv), (layer.MaxPool2d, _StreamedPool)):
            if isinstance(module, kind):
                own = type(module)
                module.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})


def install_pools(net: nn.Module) -> None:
    """For policy ``layer``: the gradient of a max-pool's spikes, the largest tensor of a step, is made in
    chunks."""
    for module in net.modules():
        if isinstance(module, layer.MaxPool2d):
            own = type(module)
            module.__class__ = type(own.__name__, (_LeanPool, own), {"__module__": own.__module__})


def remove(net: nn.Module) -> None:
    """Undo ``install`` and ``install_pools``."""
    for module in net.modules():
        if isinstance(module, _StreamedConv | _StreamedPool | _LeanPool):
            module.__class__ = type(module).__mro__[2]


def stream(plain: Any, policy: Policy, x_seq: Tensor) -> Any:
    """The net's forward, in chunks inside of its layers."""
    _active.append((policy.steps, policy.detach, not policy.layer))
    try:
        out = plain(x_seq)
    finally:
        _active.pop()
    return out.whole() if isinstance(out, Lazy) else out


class _Source:
    """The input of a layer, kept as bits where it is spikes, by chunks."""

    def __init__(self, x: Tensor) -> None:
        self.kept: Tensor | KeptSpikes
        if isinstance(x, Lazy):
            self.kept = x.same()
        elif spikes.is_spikes(x):
            self.kept = KeptSpikes(x)
        else:
            self.kept = x.detach()

    def __call__(self, a: int, b: int) -> Tensor:
        if isinstance(self.kept, KeptSpikes):
            part = self.kept.steps(a, b)
        else:
            part = chunk_of(self.kept, a, b)  # type: ignore[assignment]
        return part


class _StreamedConv:
    """Mixin put before a convolution's class."""

    def forward(self, x: Tensor) -> Tensor:
        """A Lazy output where the policy is at work; else torch's."""
        plain = super().forward  # type: ignore[misc]
        if not _active or not torch.is_grad_enabled() or x.dim() != 5 or x.shape[0] == 1:
            return plain(x)
        if not isinstance(x, Lazy) and x.stride(0) == 0:  # one image repeated: convolved once
            y = plain(x)
            once = getattr(spikes.marked(y), "scalesnn_once", None)
            return y if once is None else spikes.mark_repeated(y, _AsLazy.apply(once, _active[-1]))
        assert isinstance(self, layer.Conv2d)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return plain(x.whole() if isinstance(x, Lazy) else x)
        return _Convolution.apply(x, self.weight, self.bias, self, _active[-1])


class _AsLazy(torch.autograd.Function):
    """A dense tensor in the guise of a Lazy one, so that what is made of it is chunked."""

    @staticmethod
    def forward(ctx: Any, once: Tensor, options: Options) -> Tensor:
        kept = once.detach().unsqueeze(0)
        return Lazy(tuple(once.shape), once.stride(), once.dtype, once.device, lambda a, b: kept, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Convolution(torch.autograd.Function):
    """A convolution whose output is Lazy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: layer.Conv2d, options: Options
    ) -> Tensor:
        device = x.device.type
        context, source = ambient(device), _Source(x)
        ctx.save_for_backward(weight)
        ctx.source, ctx.total, ctx.steps = source, x.shape[0], options[0]
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.x_dtype, ctx.module = x.dtype, module
        ctx.geometry = (module.stride, module.padding, module.dilation, False, [0, 0], module.groups)
        ctx.bias_sizes = None if bias is None else list(bias.shape)

        def make(a: int, b: int) -> Tensor:
            with torch.no_grad(), context():
                if getattr(module, "weight_at_hand", False):
                    return module.forward(source(a, b))
                return module(source(a, b))  # ZeRO-3 gathers the weight in the module's own call

        with torch.no_grad():
            probe = make(0, 1)
        shape = (x.shape[0], *probe.shape[1:])
        return Lazy(shape, strides_of_sequence(probe), probe.dtype, probe.device, make, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x: Tensor | None = None
        sums: list[Tensor | None] = [None, None]
        cast = weight.detach().to(
            ctx.dtype
        )  # detached: making a chunk lets ZeRO-3 take the weight away again
        ctx.module.weight_at_hand = True  # its own call would have ZeRO-3 take the weight away again
        for a, b in spans(ctx.total, ctx.steps):
            part, of_grad = ctx.source(a, b), chunk_of(grad, a, b)
            assert of_grad is not None
            of_x, *of_parameters = torch.ops.aten.convolution_backward(
                of_grad.flatten(0, 1).to(ctx.dtype),
                part.flatten(0, 1).to(ctx.dtype),
                cast,
                ctx.bias_sizes,
                *ctx.geometry,
                [need_x, need_weight, need_bias],
            )
            for i, value in enumerate(of_parameters):
                if value is not None:
                    value, old = value.to(weight.dtype), sums[i]
                    sums[i] = value if old is None else old.add_(value)
            if need_x:
                of_x = of_x.unflatten(0, part.shape[:2])
                if grad_x is None:
                    shape, stride = (ctx.total, *of_x.shape[1:]), strides_of_sequence(of_x)
                    grad_x = torch.empty_strided(shape, stride, dtype=ctx.x_dtype, device=of_x.device)
                grad_x[a:b] = of_x
        del ctx.module.weight_at_hand
        return grad_x, *sums, None, None


class _StreamedPool:
    """Mixin put before a max-pool's class."""

    def forward(self, x: Tensor) -> Tensor:
        """Pooled spikes as bits where the policy is at work; else torch's."""
        plain = super().forward  # type: ignore[misc]
        assert isinstance(self, layer.MaxPool2d)
        if not _active or not isinstance(x, Lazy) or spikes.is_spikes(x) != 1 or self.return_indices:
            return plain(x)
        y = _Pool.apply(x, self, _active[-1])
        return spikes.mark_spikes(y, 1, y.rows)


class _LeanPool:
    """Mixin put before a max-pool's class, for policy ``layer``."""

    def forward(self, x: Tensor) -> Tensor:
        """Torch's output; of dense spikes the gradient is Lazy."""
        assert isinstance(self, layer.MaxPool2d)
        known = spikes.bits_of(x) if spikes.is_spikes(x) == 1 and x.dim() == 5 and x.stride(0) else None
        if not torch.is_grad_enabled() or known is None or known[1] or self.return_indices:
            return super().forward(x)  # type: ignore[misc]
        return spikes.mark_spikes(_PoolOfBits.apply(x, KeptSpikes(x), self.geometry()))


class _Pool(torch.autograd.Function):
    """A max-pool of spikes, whose gradient is Lazy."""

    @staticmethod
    def forward(ctx: Any, x: Lazy, pool: layer.MaxPool2d, options: Options) -> Tensor:
        ctx.geometry = pool.geometry()
        ctx.x, ctx.options = x.same(), options
        packed, like = [], None
        for t in range(x.shape[0]):
            like, _ = torch.ops.aten.max_pool2d_with_indices(x.make(t, t + 1).flatten(0, 1), *ctx.geometry)
            packed.append(ops.pack(like, 1))
        assert like is not None
        like = like.unflatten(0, (1, -1))
        rows, step_shape, stride, dtype = torch.cat(packed), tuple(like.shape[1:]), like.stride(), like.dtype

        def make(a: int, b: int) -> Tensor:
            return ops.unpack(rows[a:b], 0, (b - a, *step_shape), stride, dtype)

        shape = (x.shape[0], *step_shape)
        out = Lazy(shape, strides_of_sequence(like), dtype, x.device, make, options)
        out.rows = rows
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gradient_of_pool(ctx.x.make, grad, ctx.x, ctx.geometry, ctx.options), None, None


class _PoolOfBits(torch.autograd.Function):
    """A max-pool of dense spikes, of which the bits are kept; its gradient is Lazy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: KeptSpikes, geometry: Geometry) -> Tensor:
        ctx.kept, ctx.geometry = kept, geometry
        y, _ = torch.ops.aten.max_pool2d_with_indices(x.flatten(0, 1), *geometry)
        return y.unflatten(0, x.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        kept = ctx.kept
        like = torch.empty_strided(kept.shape, kept.stride, dtype=grad.dtype, device="meta")
        return _gradient_of_pool(kept.steps, grad, like, ctx.geometry, LEAN), None, None


def _gradient_of_pool(
    images: Chunk, grad: Tensor, like: Tensor, geometry: Geometry, options: Options
) -> Lazy:
    """The gradient of a max-pool's input, which is like ``like`` and comes from ``images``."""
    shape, stride, device = tuple(like.shape), like.stride(), grad.device

    def make(a: int, b: int) -> Tensor:
        of_y = chunk_of(grad, a, b)
        assert of_y is not None
        of_x = torch.empty_strided((b - a, *shape[1:]), stride, dtype=grad.dtype, device=device)
        for t in range(a, b):  # a step at a time: the int64 places are large
            x = images(t, t + 1)[0]
            _, places = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
            of_x[t - a] = torch.ops.aten.max_pool2d_with_indices_backward(of_y[t - a], x, *geometry, places)
        return of_x

    return Lazy(shape, stride, grad.dtype, device, make, options)
