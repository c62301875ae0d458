"""What the step-mode layers share: torch's layer on images, in step mode ``'s'`` or over a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from scalesnn.base import StepModule, UserError
from scalesnn.functional import seq_to_ann_forward
from scalesnn.kernels import spikes

__all__ = ["Plain", "StepLayer", "check_images", "is_repeated", "is_watched", "once_of"]


SPACE = ("", ", L", ", H, W", ", D, H, W")  # of inputs with 0 … 3 dimensions of space


class StepLayer(nn.Module, StepModule):
    """What the wrapped torch layers share. It stands before torch's class among a layer's bases.

    Attributes:
        spaces: how many dimensions of space an input may have, after N and C.
    """

    spaces: ClassVar[tuple[int, ...]] = (2,)

    def __init__(self, *args: Any, step_mode: str = "s", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_mode = step_mode

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        parts = (super().extra_repr(), f"step_mode={self.step_mode}")
        return ", ".join(part for part in parts if part)

    def _over_time(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run torch's ``forward`` on images (or whatever ``spaces`` says), in either step mode."""
        check_images(self, x)
        if self.step_mode == "s":
            return forward(x)
        if is_repeated(x):
            once = forward(once_of(x))
            return spikes.mark_repeated(once.expand(x.shape[0], *once.shape), once)
        return seq_to_ann_forward(x, forward)


class Plain(StepLayer):
    """torch's layer without state over time, and without more to know than the step mode."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, …] or [T, N, C, …], as ``step_mode`` says."""
        return self._over_time(super().forward, x)


def check_images(layer: StepLayer, x: Tensor) -> None:
    """Refuse an input that does not fit the step mode. One sample without N is torch's to take or refuse."""
    time = int(layer.step_mode == "m")
    spaces, space = layer.spaces, x.dim() - 2 - time
    if space in spaces or (not time and space + 1 in spaces):
        return
    expected = " or ".join(f"[{'T, ' * time}N, C{SPACE[s]}]" for s in spaces)
    message = (
        f"{type(layer).__name__} in step mode {layer.step_mode!r} expects {expected}, got {tuple(x.shape)}"
    )
    if not time and space - 1 in spaces:
        message += ": call functional.set_step_mode(model, 'm')"
    elif time and space + 1 in spaces:
        message += ": call functional.set_step_mode(model, 's'), or put the time-steps first"
    raise UserError(message)


def is_repeated(x_seq: Tensor) -> bool:
    """Whether all time-steps are the same memory: an expanded view."""
    return x_seq.shape[0] > 1 and x_seq.stride(0) == 0


def once_of(x_seq: Tensor) -> Tensor:
    """The one step [N, …] that a sequence repeats."""
    once = getattr(spikes.marked(x_seq), "scalesnn_once", None)
    return x_seq[0] if once is None else once


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook looks at the module's input, which a fused unit does not make. The hooks of
    ZeRO-3 and FSDP2, which gather parameters, do not count."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    names = (getattr(hook, "__module__", "") or "" for hook in hooks)
    return any(not name.startswith(("deepspeed.", "torch.")) for name in names)
