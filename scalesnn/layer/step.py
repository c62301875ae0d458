"""What the step-mode layers share: torch's layer on images, in step mode ``'s'`` or over a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scalesnn.base import StepModule, UserError
from scalesnn.functional import seq_to_ann_forward
from scalesnn.kernels import spikes

__all__ = ["StepLayer", "check_images", "is_repeated", "once_of"]


class StepLayer(nn.Module, StepModule):
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
        check_images(self, x)
        if self.step_mode == "s":
            return forward(x)
        if is_repeated(x):
            once = forward(once_of(x))
            return spikes.mark_repeated(once.expand(x.shape[0], *once.shape), once)
        return seq_to_ann_forward(x, forward)


def check_images(layer: StepModule, x: Tensor) -> None:
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


def is_repeated(x_seq: Tensor) -> bool:
    """Whether all time-steps are the same memory: an expanded view."""
    return x_seq.shape[0] > 1 and x_seq.stride(0) == 0


def once_of(x_seq: Tensor) -> Tensor:
    """The one step [N, …] that a sequence repeats."""
    once = getattr(spikes.marked(x_seq), "scalesnn_once", None)
    return x_seq[0] if once is None else once
