"""Policy ``time:K`` with BatchNorm over the whole sequence: layer after layer, each in chunks of K steps.

A convolution makes no output but a ``Lazy`` one. BatchNorm reads it chunk by chunk for the statistics, the
unit once more for the spikes, which stay as bits; backward makes the chunks again, last to first, and so
come the gradients (see ``gradients``).
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn import layer
from scalesnn.kernels import packing, spike_conv, spike_layers, spikes
from scalesnn.memory.front import has_front, run_front
from scalesnn.memory.gradients import kept_gradient, lazy_gradient
from scalesnn.memory.lazy import Chunk, Kept, Lazy, Options, reader, spans, strides_of_sequence
from scalesnn.memory.mixins import put_before, take_off
from scalesnn.memory.rematerialise import KeptSpikes, ambient

if TYPE_CHECKING:
    from scalesnn.memory.policy import Policy

__all__ = ["install", "install_pools", "remove", "stream"]

Geometry = tuple[list[int], list[int], list[int], list[int], bool]
LARGE = 16  # times a weight's size is a chunk that gradients cut further
LEAN = Options(4)  # a gradient in chunks of 4 steps
_active: list[Options] = []


def install(net: nn.Module) -> None:
    """Have the net's convolutions and max-pools take part."""
    for module in net.modules():
        for kind, mixin in ((layer.Conv2d, _StreamedConv), (layer.MaxPool2d, _StreamedPool)):
            if isinstance(module, kind):
                put_before(module, mixin)


def install_pools(net: nn.Module) -> None:
    """For policy ``layer``: the gradient of a max-pool's spikes, the largest tensor of a step, is made in
    chunks."""
    for module in net.modules():
        if isinstance(module, layer.MaxPool2d):
            put_before(module, _LeanPool)


def remove(net: nn.Module) -> None:
    """Undo ``install`` and ``install_pools``."""
    take_off(net, _StreamedConv, _StreamedPool, _LeanPool)


def stream(net: nn.Module, plain: Any, policy: Policy, x_seq: Tensor) -> Any:
    """The net's forward, in chunks inside of its layers."""
    options = Options(policy.steps, policy.detach, not policy.layer, policy.whole, _is_sharded(net))
    _active.append(options)
    try:
        if has_front(net, options, x_seq):
            out, rest = run_front(net, options, x_seq)
            for piece in rest:
                out = piece.run(out)
        else:
            out = plain(x_seq)
    finally:
        _active.pop()
    return out.whole() if isinstance(out, Lazy) else out


def _is_sharded(net: nn.Module) -> bool:
    """Whether a module's weights are there only while it is at work (ZeRO-3, FSDP2)."""
    return any(hasattr(module, "_get_fsdp_state") for module in net.modules()) or any(
        hasattr(parameter, "ds_tensor") for parameter in net.parameters()
    )


class _Source:
    """The input of a layer, by chunks.

    Attributes:
        tensor: all there is to keep of it: its bits where it is spikes.
        spikes: what else is known of spikes.
    """

    def __init__(self, x: Tensor) -> None:
        self.spikes = KeptSpikes(x) if not isinstance(x, Lazy) and spikes.is_spikes(x) else None
        self.tensor = x if self.spikes is None else self.spikes.bits

    def without_tensor(self) -> _Source:
        """The rest of it: autograd keeps the tensor, and frees it when backward has been there."""
        rest = copy.copy(self)
        rest.spikes = copy.copy(self.spikes)
        del rest.tensor
        if rest.spikes is not None:
            del rest.spikes.bits
        return rest

    def with_tensor(self, tensor: Tensor) -> _Source:
        """Whole again."""
        source = copy.copy(self)
        source.spikes, source.tensor = copy.copy(self.spikes), tensor
        if source.spikes is not None:
            source.spikes.bits = tensor
        return source

    def chunks(self) -> Chunk:
        """What makes chunks."""
        return reader(self.tensor.detach()) if self.spikes is None else self.spikes.steps


class _StreamedConv:
    """Mixin put before a convolution's class."""

    weight_at_hand = False  # it is gathered for the module's backward
    lend_to: list[Tensor | None] | None = None  # takes copies of weight and bias in the module's next call

    def forward(self, x: Tensor) -> Tensor:
        """A Lazy output where the policy is at work; else torch's."""
        plain = super().forward  # type: ignore[misc]
        if self.lend_to is not None:
            assert isinstance(self, layer.Conv2d)
            self.lend_to[:] = [None if p is None else p.detach().clone() for p in (self.weight, self.bias)]
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
    """A convolution whose output is Lazy, and the gradient of its input where that was Lazy too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: Any, options: Options
    ) -> Tensor:
        device = x.device.type
        context, source = ambient(device), _Source(x)
        ctx.save_for_backward(weight, source.tensor)
        ctx.source, ctx.options, ctx.module = source.without_tensor(), options, module
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.geometry = (module.stride, module.padding, module.dilation, module.groups)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.shape, ctx.x_dtype, ctx.is_lazy = tuple(x.shape), x.dtype, isinstance(x, Lazy)
        chunk = source.chunks()
        # ZeRO-3 gathers the weight in the module's own call, and takes it away after: one call a sweep
        lent: list[Tensor | None] = []
        if hasattr(weight, "ds_tensor"):
            lent = [weight.detach().clone(), None if bias is None else bias.detach().clone()]

        def make(a: int, b: int) -> Tensor:
            part = chunk(a, b)
            with torch.no_grad(), context():
                if module.weight_at_hand or not hasattr(weight, "ds_tensor"):
                    return module.forward(part)
                if not lent:
                    module.lend_to = lent
                    try:
                        return module(part)
                    finally:
                        module.lend_to = None
                return module._conv_forward(part.flatten(0, 1), *lent).unflatten(0, part.shape[:2])

        with torch.no_grad():
            probe = make(0, 1)
        shape = (x.shape[0], *probe.shape[1:])
        out = Lazy(shape, strides_of_sequence(probe), probe.dtype, probe.device, make, options)
        out.done = lent.clear
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, tensor = ctx.saved_tensors
        source = ctx.source.with_tensor(tensor).chunks()
        need_x, *needs = ctx.needs_input_grad[:3]
        options, of_y, dtype, x_dtype, is_lazy = (
            ctx.options,
            reader(grad),
            ctx.dtype,
            ctx.x_dtype,
            ctx.is_lazy,
        )
        total, *step_shape = ctx.shape
        geometry, bias_sizes, device = ctx.geometry, ctx.bias_sizes, grad.device
        cast = weight.detach().to(dtype)

        small = options.steps  # a unit's gradient comes by chunks; others by any steps, and less is alive
        large = options.steps * math.prod(step_shape) > LARGE * weight.numel()  # a call handles that, too
        if large and (not isinstance(grad, Lazy) or grad.depth == 0):
            small = max(options.steps // 4, 1)

        def run(of_images: Tensor, part: Tensor, mask: list[bool]) -> tuple[Any, ...]:
            of_images, known = of_images.flatten(0, 1).to(dtype), spikes.is_spikes(part) == 1 and mask[1]
            bits, planes = (spikes.bits_of(part) if known else None) or (None, 0)
            part = part.flatten(0, 1).to(dtype)
            if bits is not None and not spike_conv.suits(part, planes, cast, geometry[-1]):
                bits = None
            return spike_layers.convolution_backward(of_images, part, bits, cast, bias_sizes, mask, *geometry)

        def of_input(a: int, b: int) -> Tensor:
            out = torch.empty_strided((b - a, *step_shape), tensor.stride(), dtype=x_dtype, device=device)
            for start, end in spans(b - a, small):
                unread = torch.empty_strided(
                    (end - start, *step_shape), tensor.stride(), dtype=dtype, device=device
                )
                of_x = run(of_y(a + start, a + end), unread, [True, False, False])[0]
                out[start:end] = of_x.unflatten(0, (end - start, -1))
            return out

        later = need_x and is_lazy and not options.at_once
        kept, dense = Kept(total, options.steps), None
        sums: list[Tensor | None] = [None, None]
        ctx.module.weight_at_hand = True
        mask = [need_x and not later, *needs]
        for a, b in spans(total, options.steps, last_first=True) if any(mask) else ():
            of_images = of_y(a, b)
            of_x, *of_parameters = run(of_images, source(a, b), mask)
            del of_images
            for i, value in enumerate(of_parameters):
                if value is not None:
                    value, old = value.to(weight.dtype), sums[i]
                    sums[i] = value if old is None else old.add_(value)
            if not mask[0]:
                continue
            of_x = of_x.unflatten(0, (b - a, -1)).to(x_dtype)
            if is_lazy:
                kept.put(a, of_x)
                continue
            if dense is None:
                shape, stride = (total, *of_x.shape[1:]), strides_of_sequence(of_x)
                dense = torch.empty_strided(shape, stride, dtype=x_dtype, device=of_x.device)
            dense[a:b] = of_x
        ctx.module.weight_at_hand = False
        grad_x: Tensor | None = dense
        if later:
            grad_x = lazy_gradient(tensor, of_input, options, grad)
        elif need_x and is_lazy:
            grad_x = kept_gradient(tensor, kept, options)
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
        ctx.options = options
        ctx.save_for_backward(x)
        packed, like = [], None
        for t in range(x.shape[0]):
            like, _ = torch.ops.aten.max_pool2d_with_indices(x.make(t, t + 1).flatten(0, 1), *ctx.geometry)
            packed.append(packing.pack(like, 1))
        assert like is not None
        like = like.unflatten(0, (1, -1))
        rows, step_shape, stride, dtype = torch.cat(packed), tuple(like.shape[1:]), like.stride(), like.dtype

        def make(a: int, b: int) -> Tensor:
            part = packing.unpack(rows[a:b], 0, (b - a, *step_shape), stride, dtype)
            return spikes.mark_spikes(part, 1, rows[a:b])

        shape = (x.shape[0], *step_shape)
        out = Lazy(shape, strides_of_sequence(like), dtype, x.device, make, options)
        out.rows = rows
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _gradient_of_pool(x.make, grad, x, ctx.geometry, ctx.options), None, None


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
        like = torch.empty_strided(kept.shape, kept.stride, dtype=grad.dtype, device=grad.device)
        return _gradient_of_pool(kept.steps, grad, like, ctx.geometry, LEAN), None, None


def _gradient_of_pool(
    images: Chunk, grad: Tensor, like: Tensor, geometry: Geometry, options: Options
) -> Lazy:
    """The gradient of a max-pool's input, which is like ``like`` and comes from ``images``."""
    stride, dtype, device, of_pooled = like.stride(), grad.dtype, grad.device, reader(grad)
    shape = like.shape

    def make(a: int, b: int) -> Tensor:
        of_y = of_pooled(a, b)
        of_x = torch.empty_strided((b - a, *shape[1:]), stride, dtype=dtype, device=device)
        for t in range(a, b):  # a step at a time: the int64 places are large
            x = images(t, t + 1)[0]
            _, places = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
            of_x[t - a] = torch.ops.aten.max_pool2d_with_indices_backward(of_y[t - a], x, *geometry, places)
        return of_x

    return lazy_gradient(like, make, options, grad)
