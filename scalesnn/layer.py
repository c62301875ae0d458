"""torch's layers that know step modes: ``'s'`` takes [N, …], as in torch; ``'m'`` takes a sequence [T, N, …].

The parameters, their names and their initial values are torch's. A sequence is handed to torch as [T × N,
…] without a copy, and keeps its memory format (channels_last included). A sequence that is one image
repeated (an expanded view, see ``functional.repeat_over_time``) is computed once where the layer has no
state of its own over time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalesnn.base import MemoryModule, MultiStepModule, StepModule, UserError
from scalesnn.functional import multi_step_forward, seq_to_ann_forward
from scalesnn.kernels import normalisation, spike_layers, spikes
from scalesnn.kernels.unit import Normalisation, normalise, usable
from scalesnn.neuron import BaseNode

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "Linear",
    "MaxPool2d",
    "MultiStepContainer",
    "SeqToANNContainer",
    "convert_sync_batchnorm",
]


class _StepLayer(nn.Module, StepModule):
    """What the wrapped torch layers share. It stands before torch's class among a layer's bases."""

    def __init__(self, *args: Any, step_mode: str = "s", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_mode = step_mode

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        parts = (super().extra_repr(), f"step_mode={self.step_mode}")
        return ", ".join(part for part in parts if part)

    def _over_time(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run torch's ``forward`` on images, in either step mode."""
        _check_images(self, x)
        if self.step_mode == "s":
            return forward(x)
        if _is_repeated(x):
            once = forward(_once(x))
            return spikes.mark_repeated(once.expand(x.shape[0], *once.shape), once)
        return seq_to_ann_forward(x, forward)


def _check_images(layer: StepModule, x: Tensor) -> None:
    """Refuse an input that does not fit the step mode."""
    expected, shape = (4, "[N, C, H, W]") if layer.step_mode == "s" else (5, "[T, N, C, H, W]")
    if x.dim() == expected or (layer.step_mode == "s" and x.dim() == 3):
        return
    message = f"{type(layer).__name__} in step mode {layer.step_mode!r} expects {shape}, got {tuple(x.shape)}"
    if x.dim() == 5:
        message += ": call functional.set_step_mode(model, 'm')"
    elif x.dim() == 4:
        message += ": call functional.set_step_mode(model, 's'), or put the time-steps first"
    raise UserError(message)


def _is_repeated(x_seq: Tensor) -> bool:
    """Whether all time-steps are the same memory: an expanded view."""
    return x_seq.shape[0] > 1 and x_seq.stride(0) == 0


def _once(x_seq: Tensor) -> Tensor:
    """The one step [N, …] that a sequence repeats."""
    once = getattr(spikes.marked(x_seq), "scalesnn_once", None)
    return x_seq[0] if once is None else once


class Conv2d(_StepLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``.

    Of an input that is known to be spikes, only the bits are kept for the weight's gradient. On the CPU their
    sums are looked up rather than multiplied (``kernels.spike_conv``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every image."""
        plain = self.step_mode == "s" or x.dim() != 5 or _is_repeated(x)
        if plain or self.padding_mode != "zeros" or isinstance(self.padding, str) or not self._pays(x):
            return self._over_time(super().forward, x)
        return self._of_spikes(x)

    def _pays(self, x: Tensor) -> bool:
        """Whether the bits of ``x`` are of use: to be kept, or to be looked up."""
        largest = spikes.is_spikes(x)
        return largest > 0 and (torch.is_grad_enabled() or (largest == 1 and x.device.type == "cpu"))

    def _of_spikes(self, x: Tensor) -> Tensor:
        bits = spikes.bits_of(x)
        assert bits is not None
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        y = spike_layers.spike_conv2d(x.flatten(0, 1), *bits, weight, bias, *geometry)
        return y.unflatten(0, x.shape[:2])


class MaxPool2d(_StepLayer, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``.

    Where autograd records, the places of the maxima are kept in 2 bytes rather than 8; of an input that is
    known to be spikes only the bits are kept. Maxima of spikes are spikes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pool every image."""
        largest = spikes.is_spikes(x)
        if self.step_mode == "m" and x.requires_grad and not self.return_indices and x.dim() == 5:
            y = self._of_spikes(x) if largest and not _is_repeated(x) else self._over_time(self._lean, x)
        else:
            y = self._over_time(super().forward, x)
        return spikes.mark_spikes(y, largest) if largest and isinstance(y, Tensor) else y

    def _lean(self, x: Tensor) -> Tensor:
        return spike_layers.max_pool2d(x, *self.geometry())[0]

    def _of_spikes(self, x: Tensor) -> Tensor:
        bits = spikes.bits_of(x)
        assert bits is not None
        return spike_layers.spike_max_pool2d(x.flatten(0, 1), *bits, *self.geometry()).unflatten(
            0, x.shape[:2]
        )

    def geometry(self) -> tuple[list[int], list[int], list[int], list[int], bool]:
        """Kernel size, stride, padding and dilation, each for height and width, and ceil_mode."""
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        kernel, stride, padding, dilation = ([s, s] if isinstance(s, int) else list(s) for s in sizes)
        return kernel, stride, padding, dilation, self.ceil_mode


class AvgPool2d(_StepLayer, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's arguments, and ``step_mode``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool every image."""
        return self._over_time(super().forward, x)


class AdaptiveAvgPool2d(_StepLayer, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` for [N, C, H, W] or [T, N, C, H, W]; torch's argument, and
    ``step_mode``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool every image."""
        return self._over_time(super().forward, x)


class Linear(_StepLayer, nn.Linear):
    """``torch.nn.Linear`` for [N, …, features] or [T, N, …, features]; torch's arguments, and
    ``step_mode``."""


class Flatten(_StepLayer, nn.Flatten):
    """``torch.nn.Flatten``; ``start_dim`` and ``end_dim`` count without the time dimension, in either step
    mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten every sample."""
        return super().forward(x) if self.step_mode == "s" else seq_to_ann_forward(x, super().forward)


class _NormUnit(_StepLayer):
    """A normalisation layer that can run the unit norm → (+ residual) → neuron in one call.

    Models call ``bn(conv(x), neuron=sn, residual=identity)`` rather than ``sn(bn(conv(x)) + identity)``, so
    that the three can be fused.
    """

    def forward(self, x: Tensor, neuron: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalise; add ``residual``; fire.

        Args:
            x: [N, C, H, W] or [T, N, C, H, W], as ``step_mode`` says.
            neuron: takes the sum; its spikes are returned. Without it the sum is returned.
            residual: added to the normalised input; its shape.
        """
        if self._fuses(x, neuron, residual):
            norm = self._statistics(x)
            norm.residual = residual
            return normalise(x, norm) if neuron is None else neuron(x, norm=norm)
        y = self._normalise(x)
        if residual is not None:
            y = y + residual
        return y if neuron is None else neuron(y)

    def _fuses(self, x: Tensor, neuron: nn.Module | None, residual: Tensor | None) -> bool:
        """Whether the unit can be one fused op."""
        return False

    def _statistics(self, x: Tensor) -> Normalisation:
        """What the fused op does to ``x``; updates running statistics."""
        raise NotImplementedError

    def _normalise(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BatchNorm2d(_NormUnit, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, in step mode ``'m'`` with statistics over time, batch and space.

    torch's arguments, and ``step_mode``. ``forward(x, neuron, residual)``: the whole unit norm → (+
    residual) → neuron.

    Attributes:
        backend: 'auto' runs fused where possible, 'torch' is the reference.
        group: name of the process group over which statistics are taken, '' for none; set by
            ``convert_sync_batchnorm``.
    """

    backend: str = "auto"
    group: str = ""

    def _fuses(self, x: Tensor, neuron: nn.Module | None, residual: Tensor | None) -> bool:
        if (
            self.step_mode != "m"
            or x.dim() != 5
            or x.shape[2] != self.num_features
            or self.backend == "torch"
        ):
            return False
        if neuron is not None:
            if not isinstance(neuron, BaseNode) or not neuron.fuses(x) or is_watched(neuron):
                return False
        elif not usable(x, "auto") or (residual is None and _is_repeated(x)):
            return False
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            return False
        return not self._uses_batch() or bool(self.group) or x.numel() > x.shape[2]

    def _uses_batch(self) -> bool:
        """Whether the statistics are the batch's, not the running ones."""
        return self.training or self.running_mean is None or self.running_var is None

    def _statistics(self, x: Tensor) -> Normalisation:
        real = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self._uses_batch():
            repeated = _is_repeated(x)
            with torch.no_grad():
                moments = normalisation.batch_statistics(_once(x).unsqueeze(0) if repeated else x)
                count = torch.full((), x.numel() // x.shape[2], dtype=torch.float64, device=x.device)
                mean, variance, count = _over_group(moments, count, self.group)
                if self.training:
                    self._update_running_statistics(mean, variance, count)
                inverse_variance = (variance + self.eps).reciprocal()
                inverse_std = inverse_variance.sqrt().to(real)
                mean = mean.to(real)
            constants: tuple[Tensor, Tensor, str] | tuple[()] = (inverse_variance, count, self.group)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean = self.running_mean.to(real)
            inverse_std = (self.running_var.to(real) + self.eps).rsqrt()
            constants = ()
        scale = inverse_std if self.weight is None else self.weight.to(real) * inverse_std
        bias = torch.zeros_like(mean) if self.bias is None else self.bias.to(real)
        return Normalisation(mean, scale, bias, *constants)

    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """As torch: the running variance is of the unbiased kind."""
        if self.running_mean is None or self.running_var is None:
            return
        momentum: Tensor | float = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / self.num_batches_tracked.double()
        unbiased = variance * (count / (count - 1))
        self.running_mean.copy_(self.running_mean * (1 - momentum) + mean * momentum)
        self.running_var.copy_(self.running_var * (1 - momentum) + unbiased * momentum)

    def _normalise(self, x: Tensor) -> Tensor:
        _check_images(self, x)
        normalise = super(_NormUnit, self).forward
        if self.group and self._uses_batch():
            return self._normalise_over_group(x)
        if self.step_mode == "s":
            return normalise(x)
        n = x[0].numel() // x.shape[2]
        if not _is_repeated(x) or n == 1:
            return seq_to_ann_forward(x, normalise)
        # One image repeated T times: the same mean and variance, but the running variance is the unbiased
        # one, whose n / (n - 1) has T times as many values.
        before = self.running_var.clone() if self.training and self.running_var is not None else None
        y = normalise(x[0])
        if before is not None and self.running_var is not None and self.num_batches_tracked is not None:
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            scale = (n - 1) / n * (n * x.shape[0]) / (n * x.shape[0] - 1)
            # .data: autograd keeps running_var with the graph, unread, and would complain of the change
            self.running_var.data.mul_(scale).add_(before, alpha=(1 - momentum) * (1 - scale))
        return y.expand(x.shape[0], *y.shape)

    def _normalise_over_group(self, x: Tensor) -> Tensor:
        """Plain torch with statistics over the process group, on any backend; autograd goes through the
        sums."""
        dims = [d for d in range(x.dim()) if d != x.dim() - 3]
        wide = x.double() if x.dtype == torch.float64 else x.float()
        count = torch.full((), x.numel() // x.shape[-3], dtype=torch.float64, device=x.device)
        count = normalisation.all_reduce(count, self.group).to(wide.dtype)
        mean = normalisation.differentiable_all_reduce(wide.sum(dims), self.group) / count
        centred = wide - mean[:, None, None]
        variance = normalisation.differentiable_all_reduce(centred.square().sum(dims), self.group) / count
        if self.training:
            self._update_running_statistics(mean.detach(), variance.detach(), count)
        y = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.weight is not None and self.bias is not None:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)


def _over_group(moments: Tensor, count: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count over all ranks of a group, from each rank's own (Chan, Golub, LeVeque
    1979)."""
    if not group:
        return moments[0], moments[1], count
    moments = torch.where(count > 0, moments, 0)  # a rank without images has a say of nought
    total = normalisation.all_reduce(count, group)
    mean = normalisation.all_reduce(moments[0] * count, group) / total
    squares = (moments[1] + (moments[0] - mean).square()) * count
    return mean, normalisation.all_reduce(squares, group) / total, total


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook looks at the module's input, which a fused unit does not make. The hooks of
    ZeRO-3 and
    FSDP2, which gather parameters, do not count."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    names = (getattr(hook, "__module__", "") or "" for hook in hooks)
    return any(not name.startswith(("deepspeed.", "torch.")) for name in names)


def convert_sync_batchnorm(
    model: nn.Module, process_group: torch.distributed.ProcessGroup | None = None
) -> nn.Module:
    """Let every BatchNorm2d of the model take its statistics over all ranks of a process group, NCCL or gloo.

    Args:
        process_group: all ranks where None.

    Returns:
        the same model; its modules, parameters and state dict stay as they are.
    """
    group = torch.distributed.group.WORLD if process_group is None else process_group
    if group is None:
        raise UserError("synchronised BatchNorm needs torch.distributed to be initialised")
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.group = group.group_name
    return model


class GroupNorm(_NormUnit, nn.GroupNorm):
    """``torch.nn.GroupNorm``, of every image by itself; torch's arguments, and ``step_mode``."""

    def _normalise(self, x: Tensor) -> Tensor:
        return self._over_time(super(_NormUnit, self).forward, x)


class Dropout(MemoryModule):
    """Dropout with one mask for all time-steps of a sample, drawn anew after ``reset()``.

    Args:
        p: the probability that a value is dropped, in [0, 1).
    """

    mask: Tensor | None

    def __init__(self, p: float = 0.5, step_mode: str = "s") -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"p of Dropout must be in [0, 1), got {p}")
        self.p = p
        self.step_mode = step_mode
        self.register_memory("mask", None)

    def single_step_forward(self, x: Tensor) -> Tensor:
        """[N, …] to the same shape."""
        return x * self._mask_for(x) if self.training else x

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, …] to the same shape, the same mask at every step."""
        return x_seq * self._mask_for(x_seq[0]) if self.training else x_seq

    def _mask_for(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = F.dropout(torch.ones_like(x), self.p, training=True)
        elif self.mask.shape != x.shape:
            raise UserError(
                f"Dropout holds a mask of shape {tuple(self.mask.shape)} but got an input of shape "
                f"{tuple(x.shape)}: call functional.reset_net(net) between batches"
            )
        return self.mask

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"p={self.p}, step_mode={self.step_mode}"


class _SingleStepContainer(nn.Sequential, MultiStepModule):
    """A Sequential of modules in step mode ``'s'`` that takes sequences [T, N, …]."""

    keeps_step_mode_of_children = True

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        for module in self.modules():
            if module is not self and getattr(module, "step_mode", "s") != "s":
                raise UserError(
                    f"{type(module).__name__} inside {type(self).__name__} must have step_mode 's'"
                )


class MultiStepContainer(_SingleStepContainer):
    """Runs its single-step modules, stateful ones too, over a sequence [T, N, …], one step after the
    other."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, …] to [T, N, …]."""
        return multi_step_forward(x_seq, super().forward)


class SeqToANNContainer(_SingleStepContainer):
    """Runs stateless modules on all time-steps of a sequence [T, N, …] at once."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """[T, N, …] to [T, N, …]."""
        return seq_to_ann_forward(x_seq, super().forward)
