"""Where ZeRO keeps a rank's part of every parameter and of the optimizer's state.

Stages 1 and 2: the weights are whole on every rank; their full-precision masters lie end to end in one flat
    tensor per parameter group, cut into equal parts, one a rank. Stage 3: every parameter is flattened and
    cut on its own. Either way a rank holds one run of a parameter's flattened values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn.parallel.state import Shard, is_step

__all__ = ["FlatPart", "PartitionedGroups", "PartitionedParameters"]


class FlatPart:
    """One rank's part of one parameter: ``flat[offset : offset + length]`` holds values from ``start`` on."""

    def __init__(self, flat: Tensor, offset: int, start: int, length: int) -> None:
        self.flat, self.offset, self.start, self.length = flat, offset, start, length

    def cut(self, tensor: Tensor) -> Tensor:
        """The part's values in ``tensor``, which is laid out like ``flat``."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


class PartitionedState:
    """State of an optimizer that works on flat tensors; subclasses say which part belongs to which
    parameter."""

    def __init__(
        self, zero: Any, names: Mapping[nn.Parameter, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.zero, self.names, self.shapes = zero, names, shapes

    def parts(self) -> Iterator[tuple[str, FlatPart]]:
        """(name, part) of every parameter of which this rank holds something."""
        raise NotImplementedError

    def publish(self) -> None:
        """After the masters were written: bring the weights of the network up to date; collective."""
        raise NotImplementedError

    def parameter_shards(self) -> dict[str, Shard]:
        """This rank's part of the masters."""
        return {n: Shard(part.cut(part.flat), part.start, self.shapes[n]) for n, part in self.parts()}

    def write_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Write masters, then the weights; collective."""
        for name, part in self.parts():
            if name in values:
                part.cut(part.flat).copy_(values[name])
        self.publish()

    def optimizer_shards(self) -> dict[str, Shard]:
        """This rank's part of the optimizer's state, as ``"NAME.KEY"``."""
        shards: dict[str, Shard] = {}
        for name, part in self.parts():
            for key, value in self.zero.optimizer.state.get(part.flat, {}).items():
                if (
                    isinstance(value, Tensor)
                    and value.numel() == part.flat.numel()
                    and not is_step(key, value)
                ):
                    shards[f"{name}.{key}"] = Shard(part.cut(value), part.start, self.shapes[name])
                elif isinstance(value, (Tensor, int, float)):
                    shards[f"{name}.{key}"] = Shard(torch.as_tensor(value).float().reshape(1).cpu(), 0, ())
        return shards

    def write_optimizer(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the optimizer's state; entries as long as the part are spread, single values are scalars."""
        state = self.zero.optimizer.state
        for flat in {id(part.flat): part.flat for _, part in self.parts()}.values():
            state[flat] = {}
        for name, part in self.parts():
            own = state[part.flat]
            for key, values in saved.get(name, {}).items():
                if values.numel() != part.length or is_step(key, values):
                    own[key] = self._scalar(key, values)
                    continue
                if key not in own:
                    own[key] = torch.zeros_like(part.flat, dtype=values.dtype, requires_grad=False)
                part.cut(own[key]).copy_(values)

    def _scalar(self, key: str, values: Tensor) -> Any:
        if type(self.zero.optimizer).__module__.startswith("deepspeed."):  # its optimizers count in int
            return int(values.item()) if key == "step" else values.item()
        return values.reshape(()).clone()


class PartitionedGroups(PartitionedState):
    """ZeRO 1 and 2."""

    def parts(self) -> Iterator[tuple[str, FlatPart]]:
        for group in self.zero.bit16_groups:
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    master, weight = mapping.hp_fragment_address, mapping.lp_fragment_address
                    flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    yield self.names[parameter], FlatPart(flat, master.start, weight.start, weight.numel)

    def write_optimizer(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().write_optimizer(saved)
        self.zero._hp_optimizer_states_linked = False  # links are made anew after the next step

    def publish(self) -> None:
        self.zero.update_lp_params()


class PartitionedParameters(PartitionedState):
    """ZeRO 3."""

    def parts(self) -> Iterator[tuple[str, FlatPart]]:
        for group in self.zero.fp16_groups:
            for parameter in group:
                index, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = self.zero._get_param_partition_rank(parameter) * length
                held = max(0, min(length, parameter.ds_numel - start))
                if held:
                    flat = self.zero.fp32_partitioned_groups_flat[index]
                    yield self.names[parameter], FlatPart(flat, offset, start, held)

    def publish(self) -> None:
        zero = self.zero
        zero.parameter_offload.partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        zero.invalidate_secondary_tensor()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
