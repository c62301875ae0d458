"""The state of a run as shards: what every strategy gives to checkpoints and takes back from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scalesnn.parallel.state import (
    Shard,
    StateLayoutError,
    optimizer_shards,
    persistent_buffers,
    plain_options,
    restore_options,
    shard_of,
    write_optimizer_state,
    write_values,
)

__all__ = ["RENEWED", "StrategyState", "TrainState"]

# Optimizers that keep the same state under the same names, so that one can go on where another stopped.
FAMILIES = {"FusedAdam": "AdamW", "DeepSpeedCPUAdam": "AdamW"}
# What a checkpoint holds that follows from settings: if one of these differs, it is not restored, but as the
# new settings make it.
RENEWED: dict[str, frozenset[str]] = {
    "schedule": frozenset(
        [
            "epochs",
            "lr",
            "lr_scale",
            "lr_scheduler",
            "lr_warmup_epochs",
            "lr_warmup_method",
            "lr_warmup_decay",
            "lr_step_size",
            "lr_gamma",
        ]
    ),
    "weight_decay": frozenset({"weight_decay", "norm_weight_decay"}),
    "momentum": frozenset({"momentum"}),
}


@dataclass
class TrainState:
    """All of a run that a strategy owns: tensors as shards by name, the rest as plain values.

    Names: ``model.NAME`` (parameters in full precision, and buffers), ``optimizer.NAME.KEY``.
    """

    shards: dict[str, Shard]
    plain: dict[str, Any]


class StrategyState:
    """The half of a strategy that knows where its tensors lie. What stands here suits optimizers that work
    on whole parameters or DTensors; strategies that keep flat tensors override the four methods in the
    middle."""

    name: ClassVar[str]
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    make_scheduler: Callable[[torch.optim.Optimizer], Any]
    is_main: bool
    _names: dict[nn.Parameter, str]
    _micro_batches: int

    def sync_buffers(self) -> None:
        """Give all ranks the mean of their running statistics."""
        raise NotImplementedError

    def parameter_shards(self) -> dict[str, Shard]:
        """What this rank holds of every parameter, in full precision."""
        return {name: shard_of(parameter) for parameter, name in self._names.items()}

    def write_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Write the parameters of which ``parameter_shards`` are this rank's parts; collective."""
        for parameter, name in self._names.items():
            if name in values:
                write_values(parameter, values[name])

    def optimizer_shards(self) -> dict[str, Shard]:
        """What this rank holds of the optimizer's state, as ``"NAME.KEY"``."""
        return optimizer_shards(self.optimizer, self._names)

    def write_optimizer(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the state ``saved[NAME][KEY]`` of the optimizer."""
        write_optimizer_state(self.optimizer, self._names, saved)

    def group_names(self) -> list[list[str]]:
        """Names of the parameters in each of the optimizer's groups."""
        return [[self._names[p] for p in group["params"]] for group in self.optimizer.param_groups]

    def train_state(self) -> TrainState:
        """All that a checkpoint has to hold of model, optimizer and schedule; collective."""
        if self._micro_batches:
            raise RuntimeError("a checkpoint can only be taken between steps, not amid accumulated batches")
        self.sync_buffers()
        shards = {f"model.{name}": shard for name, shard in self.parameter_shards().items()}
        for name, buffer in persistent_buffers(self.module).items():
            shards[f"model.{name}"] = shard_of(buffer)
        shards.update({f"optimizer.{name}": shard for name, shard in self.optimizer_shards().items()})
        plain = {
            "strategy": self.name,
            "optimizer": optimizer_name(self.optimizer),
            "groups": [
                {"params": names, "options": plain_options(group)}
                for names, group in zip(self.group_names(), self.optimizer.param_groups, strict=True)
            ],
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
        }
        return TrainState(shards, plain)

    def shards_to_load(self, saved: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """Which run of values this rank wants of each saved tensor of the model and the optimizer.

        Args:
            saved: shapes of the saved tensors by name.

        Returns:
            (start, length) by name.

        Raises:
            StateLayoutError: the checkpoint is of another model.
        """
        own = self.parameter_shards()
        whole = self.whole_shapes()
        buffers = {name: tuple(b.shape) for name, b in persistent_buffers(self.module).items()}
        check_same_model({**whole, **buffers}, {n[6:]: s for n, s in saved.items() if n.startswith("model.")})
        wanted = {f"model.{name}": (0, torch.Size(shape).numel()) for name, shape in buffers.items()}
        wanted.update({f"model.{name}": (s.start, s.values.numel()) for name, s in own.items()})
        for full_name, shape in saved.items():
            if not full_name.startswith("optimizer."):
                continue
            name = full_name[len("optimizer.") :].rpartition(".")[0]
            if name in own and shape == own[name].shape:
                wanted[full_name] = (own[name].start, own[name].values.numel())
            elif name in own:
                wanted[full_name] = (0, torch.Size(shape).numel())
        return wanted

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole parameters, by name."""
        return {name: tuple(p.shape) for p, name in self._names.items()}

    def load_train_state(
        self, values: Mapping[str, Tensor], plain: Mapping[str, Any], changed: frozenset[str] = frozenset()
    ) -> None:
        """Put back what ``train_state`` gave, from the runs that ``shards_to_load`` asked for; collective.

        Args:
            values: the tensors' runs, by name.
            plain: the rest.
            changed: settings that this run has otherwise than the checkpoint; what follows from them (see
                ``RENEWED``) stays as this run made it, the schedule at the checkpoint's epoch.

        Raises:
            StateLayoutError: the checkpoint was written with another kind of optimizer, or other groups.
        """
        check_same_optimizer(self.optimizer, self.group_names(), plain)
        buffers = persistent_buffers(self.module)
        parameters: dict[str, Tensor] = {}
        optimizer: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in values.items():
            kind, _, name = full_name.partition(".")
            if kind == "optimizer":
                parameter, _, key = name.rpartition(".")
                optimizer.setdefault(parameter, {})[key] = tensor
            elif name in buffers:
                write_values(buffers[name], tensor)
            else:
                parameters[name] = tensor
        self.write_parameters(parameters)
        self.write_optimizer(optimizer)
        groups = self.optimizer.param_groups
        rates = [group.get("initial_lr", group["lr"]) for group in groups]
        kept = {key for key in ("weight_decay", "momentum") if RENEWED[key] & changed}
        for group, saved in zip(groups, plain["groups"], strict=True):
            restore_options(group, {k: v for k, v in saved["options"].items() if k not in kept})
        if self.scheduler is None or plain["scheduler"] is None:
            return
        if RENEWED["schedule"] & changed:
            self.renew_schedule(rates, plain["scheduler"])
        else:
            self.scheduler.load_state_dict(plain["scheduler"])

    def renew_schedule(self, rates: list[float], saved: Mapping[str, Any]) -> None:
        """Make the schedule anew from this run's settings, at the epoch that the saved one had reached.

        Args:
            rates: each group's initial learning rate.
            saved: state of the checkpoint's schedule.
        """
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
            group["initial_lr"] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps between these
            self.scheduler = self.make_scheduler(self.optimizer)
            for _ in range(int(saved.get("last_epoch", 0))):
                self.scheduler.step()

    def full_model_state(self) -> dict[str, Tensor]:
        """Whole weights and buffers on the CPU under torchvision's keys; empty on other ranks than 0."""
        self.sync_buffers()
        if not self.is_main:
            return {}
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}


def optimizer_name(optimizer: Any) -> str:
    """The kind of an optimizer; those that keep the same state share a name."""
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    return FAMILIES.get(name, name)


def check_same_model(own: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StateLayoutError, naming what differs, unless both have the same tensors."""
    if own == saved:
        return
    missing = [n for n in own if n not in saved]
    unknown = [n for n in saved if n not in own]
    other = [
        f"{n} is {list(saved[n])}, here {list(own[n])}" for n in own if n in saved and own[n] != saved[n]
    ]
    parts = []
    if missing:
        parts.append(f"it lacks {some(missing)}")
    if unknown:
        parts.append(f"it has {some(unknown)}, which this model has not")
    if other:
        parts.append(some(other))
    raise StateLayoutError(f"the checkpoint is of another model: {'; '.join(parts)}")


def check_same_optimizer(optimizer: Any, groups: list[list[str]], plain: Mapping[str, Any]) -> None:
    """Raise StateLayoutError unless the saved optimizer is of the same kind, with the same groups."""
    here, there = optimizer_name(optimizer), plain["optimizer"]
    if here != there:
        raise StateLayoutError(
            f"the checkpoint was written with the optimizer {there}, this run has {here}; "
            "give the same --opt (or the same optimizer in the DeepSpeed JSON)"
        )
    if [sorted(g) for g in groups] != [sorted(g["params"]) for g in plain["groups"]]:
        raise StateLayoutError(
            "the checkpoint's optimizer has its parameters in other groups; "
            "give the same --norm-weight-decay, --freeze and --lr-scale as the run that wrote it, or start "
            "anew from its weights with --init-from"
        )


def some(names: list[str], limit: int = 3) -> str:
    """The first few of many."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
