"""What a strategy hands to checkpoints and to the weight average: runs of flattened tensors.

However a strategy splits a tensor (whole on every rank, rows, or a cut through the middle of a row), what a
rank holds is a run of the tensor's values in row-major order. So one description, ``Shard``, fits DDP, ZeRO
1–3 and FSDP2, and a checkpoint of such runs can be read back under any of them, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn.base import UserError

__all__ = [
    "Shard",
    "StateLayoutError",
    "local_values",
    "optimizer_shards",
    "parameter_names",
    "persistent_buffers",
    "plain_options",
    "restore_options",
    "shard_of",
    "write_optimizer_state",
    "write_values",
]


class StateLayoutError(UserError):
    """A checkpoint holds other tensors than the run: another model, or another kind of optimizer."""


@dataclass(frozen=True)
class Shard:
    """The part of one tensor that this rank holds.

    Attributes:
        values: one-dimensional; it may share memory with the tensor itself.
        start: position of ``values[0]`` in the flattened tensor.
        shape: shape of the whole tensor.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values in the whole tensor."""
        return torch.Size(self.shape).numel()


def local_values(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a plain tensor or DTensor (sharded along dimension 0 at most): (values, start)."""
    tensor = tensor.detach()
    if not hasattr(tensor, "to_local"):
        return tensor.reshape(-1), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    split: Any = tensor  # a DTensor
    shape, offset = compute_local_shape_and_global_offset(split.shape, split.device_mesh, split.placements)
    row = tensor[0].numel() if tensor.ndim and tensor.shape[0] else 1
    local = tensor.to_local().reshape(-1)
    return local[: torch.Size(shape).numel()], (offset[0] * row if tensor.ndim else 0)


def write_values(tensor: Tensor, values: Tensor) -> None:
    """Write into a plain tensor or DTensor what ``local_values`` would read from it."""
    target = tensor.detach()
    if hasattr(target, "to_local"):
        target = target.to_local()
    with torch.no_grad():
        if target.is_contiguous():
            target.view(-1)[: values.numel()].copy_(values)
        else:
            target.copy_(values.view(target.shape))


def shard_of(tensor: Tensor, shape: Iterable[int] | None = None) -> Shard:
    """The shard of a plain tensor or DTensor."""
    values, start = local_values(tensor)
    return Shard(values, start, tuple(tensor.shape if shape is None else shape))


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Names (torchvision's keys) of all parameters of the plain network."""
    return {parameter: name for name, parameter in module.named_parameters()}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to ``state_dict()``: the running statistics of normalisation layers."""
    found: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def optimizer_shards(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, Shard]:
    """State of an optimizer that works on whole parameters or DTensors, as ``"NAME.KEY"`` → shard."""
    shards: dict[str, Shard] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                shards[f"{names[parameter]}.{key}"] = shard_of(value)
            elif isinstance(value, (int, float)):
                shards[f"{names[parameter]}.{key}"] = Shard(torch.tensor([float(value)]), 0, ())
    return shards


def write_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Any, str], saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Give an optimizer the state ``saved[NAME][KEY]``, each entry this rank's values, as just read.

    Entries as long as the parameter's part take its shape and placement; a single value stays a scalar.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state.clear()
            on_device = bool(group.get("fused") or group.get("capturable"))
            for key, values in saved.get(names[parameter], {}).items():
                state[key] = _like(parameter, values, is_counter=is_step(key, values))
                if on_device:
                    state[key] = state[key].to(parameter.device)


def is_step(key: str, values: Tensor) -> bool:
    """Whether this is the step counter, which torch's optimizers keep on the CPU."""
    return key == "step" and values.numel() == 1


def _like(parameter: Tensor, values: Tensor, *, is_counter: bool) -> Tensor:
    own, _ = local_values(parameter)
    if is_counter or values.numel() != own.numel():
        return values.reshape(()).clone()
    state = torch.zeros_like(parameter.detach())
    if values.dtype != state.dtype:
        state = state.to(values.dtype)
    write_values(state, values)
    return state


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group (rate, momentum …) as plain values."""
    options: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, Tensor):
            value = value.item()
        if value is None or isinstance(value, (bool, int, float, str, list, tuple)):
            options[key] = value
    return options


def restore_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Put saved options back into a parameter group; options that the group does not know, and those that say
    how a step is computed, are left out."""
    for key, value in saved.items():
        if key in group and key not in ("params", "fused", "foreach", "capturable"):
            old = group[key]
            group[key] = torch.full_like(old, value) if isinstance(old, Tensor) else value
