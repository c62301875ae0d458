"""One training step of the real net under FakeTensorMode: what it allocates, when, and how much it computes.

Nothing is allocated or computed: tensors know their sizes only, and every allocation and release is counted
as autograd and the policy make them.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._library import simple_registry
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scalesnn import functional
from scalesnn.base import MemoryModule
from scalesnn.kernels import spike_conv
from scalesnn.memory.policy import Policy, apply_policy

__all__ = ["Device", "Trace", "fake_copy", "potentials", "trace"]

CONVOLUTIONS = ("aten::convolution", "aten::conv2d", "scalesnn::spike_conv2d")
COMPOSED = ("aten::flatten", "aten::to", "aten::unflatten")  # of others, which FakeTensorMode is slow to find
EMPTY = ("aten::empty", "aten::empty_strided")
LOOK_UP = 0.4  # of the time of a product: what a convolution of spikes takes on the CPU


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        flops, bandwidth: operations and bytes a second that training reaches; for relative step times.
        rounding: its allocator hands out multiples of this.
        slack: what the allocator may hold beside what is alive, as a share of that.
        overhead: bytes that a step takes beside tensors: weights that convolutions put into another order,
            small blocks of the heap.
    """

    flops: float
    bandwidth: float
    rounding: int
    slack: float = 0.0
    overhead: int = 0


CPU = Device(5e10, 8e9, 64, 1 / 4, 7 << 20)  # measured by benchmarks/memory_plan.py
GPU = Device(2e14, 2e12, 512)


@dataclass
class Trace:
    """What one training step does.

    Attributes:
        events: (activation bytes, gradient bytes) alive after every allocation.
        saved: bytes alive at the end of the forward pass, the net's own tensors, its
            potentials and the input apart.
        flops, traffic: operations of convolutions, bytes written and read by everything.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    saved: int = 0
    flops: float = 0.0
    traffic: float = 0.0

    def alive(self, gradient_share: float = 1.0) -> list[float]:
        """Bytes of activations and gradients at every event, where a device keeps that share of gradients."""
        return [a + gradient_share * g for a, g in self.events]

    @property
    def activations(self) -> int:
        """Most bytes of activations at a time."""
        return max((a for a, _ in self.events), default=0)

    def seconds(self, device: Device) -> float:
        """An estimate that is good for ratios only."""
        return self.flops / device.flops + self.traffic / device.bandwidth


class _Ledger(TorchDispatchMode):
    """Counts storages as they come and go."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its guard around every operation takes long, and nothing is compiled here

    def __init__(self, trace: Trace, rounding: int, own: Sequence[Tensor]) -> None:
        super().__init__()
        self.trace, self.rounding = trace, rounding
        self.lazy_pages = rounding == CPU.rounding
        self.activations = self.gradients = 0
        self.in_backward = False
        self._known: dict[int, Any] = {}
        self._kinds: dict[int, str] = {}
        for tensor in own:
            self._see(tensor, "own")

    def _see(self, tensor: Tensor, kind: str = "activation") -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        self._kinds[key] = kind
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        if kind == "activation":
            self.activations += size
            self.trace.events.append((self.activations, self.gradients))

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        kind = self._kinds.pop(key, "own")
        if kind == "activation":
            self.activations -= size
        elif kind == "gradient":
            self.gradients -= size

    def is_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter as such from now on."""
        if parameter.grad is None:
            return
        storage = parameter.grad.untyped_storage()
        if self._kinds.get(storage._cdata) == "activation":
            size = -(-storage.nbytes() // self.rounding) * self.rounding
            self._kinds[storage._cdata] = "gradient"
            self.activations -= size
            self.gradients += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked for all the time
            return args[0].fake_device
        name = func._schema.name
        sums_up = self.in_backward and name == "aten::add" and not torch.is_grad_enabled()
        if sums_up and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            func, name = torch.ops.aten.add_.Tensor, "aten::add_"  # autograd does so in place
        if name in COMPOSED:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if self.lazy_pages:  # memory that nobody has touched takes none
            for index, arg in enumerate(args):
                if type(arg).__name__ == "FakeTensor" and (index != 1 or _is_read(name, args)):
                    self._see(arg)
        make = func
        if func.namespace == "scalesnn":  # its function of sizes, which FakeTensorMode is slow to reach
            make = simple_registry.singleton.find(name).fake_impl.kernel
        out = make(*args, **(kwargs or {}))
        results = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        for tensor in results:
            if type(tensor).__name__ == "FakeTensor" and not (self.lazy_pages and name in EMPTY):
                self._see(tensor)
        if func.is_view or name == "aten::detach" or name in EMPTY or not results:
            return out
        inputs = [a for a in args[1 if name == "aten::copy_" else 0 :] if isinstance(a, Tensor)]
        self.trace.traffic += sum(_size(t) for t in (*results, *inputs))
        if name in CONVOLUTIONS:
            weight = args[3] if name == CONVOLUTIONS[2] else args[1]
            looks_up = name == CONVOLUTIONS[2] and spike_conv.suits(args[0], args[2], weight, args[8])
            self.trace.flops += _flops(results[0], weight) * (LOOK_UP if looks_up else 1)
        elif name == "scalesnn::spike_conv2d_weight":
            self.trace.flops += _flops(args[0], args[3]) * LOOK_UP
        elif name == "aten::convolution_backward":
            wanted = sum(bool(w) for w in args[10][:2])
            self.trace.flops += wanted * _flops(args[0], args[2])
        return out


def _is_read(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operation reads its second argument, and not only its shape."""
    if name == "aten::convolution_backward":  # the input, for the weight's gradient
        return bool(args[10][1])
    return name != "aten::max_pool2d_with_indices_backward"


def _size(tensor: Tensor) -> int:
    """Bytes that a kernel touches: of an expanded view only what there is."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(output: Tensor, weight: Tensor) -> float:
    return 2.0 * output.numel() * math.prod(weight.shape[1:])


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the net whose tensors have sizes only."""
    with FakeCopyMode(mode):
        return copy.deepcopy(model)


def trace(
    model: nn.Module,
    sample_shape: Sequence[int],
    policy: Policy,
    *,
    mode: FakeTensorMode,
    amp_dtype: torch.dtype | None = None,
    rounding: int = 64,
    static: bool = True,
) -> Trace:
    """Count one training step: forward, cross entropy of the mean over T, backward.

    Args:
        model: a net of fake tensors of ``mode`` (made under it, or by ``fake_copy``); it is left without a
            policy.
        sample_shape: [T, N, C, H, W], or [N, C, H, W].
        amp_dtype: of autocast; None: without.
        static: the input is one image repeated over T.
    """
    found = Trace()
    with mode:
        apply_policy(model, policy)
        model.train()
        shape = tuple(sample_shape)
        if len(shape) == 5 and static:
            x = torch.empty(shape[1:]).contiguous(memory_format=torch.channels_last).expand(shape)
        else:
            x = torch.empty(shape)
        target = torch.zeros(shape[-4], dtype=torch.long)
        ledger = _Ledger(found, rounding, [*model.parameters(), *model.buffers(), x, target])
        handles: list[Any] = []
        for parameter in model.parameters():
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(ledger.is_gradient))
        context: AbstractContextManager[Any] = nullcontext()
        if amp_dtype is not None:
            context = torch.autocast("cpu", amp_dtype)
        look_up = nullcontext() if rounding == CPU.rounding else spike_conv.products()
        collects = gc.isenabled()
        gc.disable()  # it looks through all objects again and again
        try:
            with ledger, look_up:
                with context:
                    loss = _loss(model, x, target)
                found.saved = ledger.activations - potentials(model)
                ledger.in_backward = True
                loss.backward()
                del loss
        finally:
            if collects:
                gc.enable()
            for handle in handles:
                handle.remove()
            functional.reset_net(model)
            for parameter in model.parameters():
                parameter.grad = None
            apply_policy(model, Policy())
    return found


def potentials(model: nn.Module) -> int:
    """Bytes of the net's memories, which live without autograd."""
    values = [v for m in model.modules() if isinstance(m, MemoryModule) for v in m.memories()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    y = model(x)
    return nn.functional.cross_entropy((y.mean(0) if y.dim() == 3 else y).float(), target)
