"""Linear, Flatten, Upsample and Dropout that know step modes, and containers of single-step modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalesnn.base import MemoryModule, MultiStepModule, UserError
from scalesnn.functional import multi_step_forward, seq_to_ann_forward
from scalesnn.layer.step import StepLayer

__all__ = [
    "Dropout",
    "Dropout2d",
    "Flatten",
    "Identity",
    "Linear",
    "MultiStepContainer",
    "SeqToANNContainer",
    "Upsample",
]


class Linear(StepLayer, nn.Linear):
    """``torch.nn.Linear`` for [N, …, features] or [T, N, …, features]; torch's arguments, and
    ``step_mode``."""


class Flatten(StepLayer, nn.Flatten):
    """``torch.nn.Flatten``; ``start_dim`` and ``end_dim`` count without the time dimension, in either step
    mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten every sample."""
        return super().forward(x) if self.step_mode == "s" else seq_to_ann_forward(x, super().forward)


class Identity(StepLayer, nn.Identity):
    """``torch.nn.Identity``, of any shape, with a ``step_mode`` that can be set."""


class Upsample(StepLayer, nn.Upsample):
    """``torch.nn.Upsample`` for [N, C, …] or [T, N, C, …]; torch's arguments, and ``step_mode``."""

    def forward(self, x: Tensor) -> Tensor:
        """Upsample every sample."""
        return super().forward(x) if self.step_mode == "s" else seq_to_ann_forward(x, super().forward)


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
            self.mask = self._draw(x)
        elif self.mask.shape != x.shape:
            raise UserError(
                f"Dropout holds a mask of shape {tuple(self.mask.shape)} but got an input of shape "
                f"{tuple(x.shape)}: call functional.reset_net(net) between batches"
            )
        return self.mask

    def _draw(self, x: Tensor) -> Tensor:
        return F.dropout(torch.ones_like(x), self.p, training=True)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"p={self.p}, step_mode={self.step_mode}"


class Dropout2d(Dropout):
    """``Dropout`` of whole channels of [N, C, H, W] or [T, N, C, H, W]."""

    def _draw(self, x: Tensor) -> Tensor:
        return F.dropout2d(torch.ones_like(x), self.p, training=True)


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
