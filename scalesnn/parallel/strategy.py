"""The interface behind which DDP, DeepSpeed and FSDP2 look alike to the training loop.

The order of a run::

    device = strategy.setup_device("auto")          the process group is there from now on
    strategy.prepare(model, make_optimizer, make_scheduler)
    for images, targets in batches:
        with strategy.autocast():
            loss = criterion(strategy.model(images), targets)
        strategy.backward(loss)
        result = strategy.step()                    does nothing until enough batches are accumulated
    strategy.sync_buffers(); evaluate strategy.evaluation_model
    strategy.close()

A new strategy is one file with a subclass and one row in ``arguments.STRATEGIES``.
"""

from __future__ import annotations

import contextlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scalesnn.base import UserError
from scalesnn.parallel.failure import FailureWatch
from scalesnn.parallel.finite import PATIENCE, BatchMemory, NonFiniteLossError
from scalesnn.parallel.state import (
    Shard,
    StateLayoutError,
    optimizer_shards,
    parameter_names,
    persistent_buffers,
    plain_options,
    restore_options,
    shard_of,
    write_optimizer_state,
    write_values,
)
from scalesnn.parallel.topology import Topology

__all__ = ["MakeOptimizer", "MakeScheduler", "StepResult", "Strategy", "TrainState"]

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]

# Optimizers that keep the same state under the same names, so that one can go on where another stopped.
FAMILIES = {"FusedAdam": "AdamW", "DeepSpeedCPUAdam": "AdamW"}


@dataclass(frozen=True)
class StepResult:
    """What ``Strategy.step`` did: the norm of the gradients before clipping where it is known, and whether
    the weights were updated."""

    grad_norm: Tensor | float | None
    stepped: bool
    skipped: bool = False


@dataclass
class TrainState:
    """All of a run that a strategy owns: tensors as shards by name, the rest as plain values.

    Names: ``model.NAME`` (parameters in full precision, and buffers), ``optimizer.NAME.KEY``.
    """

    shards: dict[str, Shard]
    plain: dict[str, Any]


class Strategy(ABC):
    """How a network is trained on one or many devices. Subclasses fill in ``_prepare``, ``_backward``,
    ``_step`` and, where they split tensors in a way of their own, the state methods."""

    name: ClassVar[str]
    needs_process_group: ClassVar[bool] = True
    contiguous_weights: ClassVar[bool] = False  # whether weights must lie in memory in row-major order

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    device: torch.device

    def __init__(self, args: Any, topology: Topology) -> None:
        self.args = args
        self.topology = topology
        self.rank, self.world_size = topology.rank, topology.world_size
        self.is_main = self.rank == 0
        self.accumulation: int = getattr(args, "gradient_accumulation", None) or 1
        self.clip_grad_norm: float = getattr(args, "clip_grad_norm", None) or 0.0
        self.on_nan: str = getattr(args, "on_nan", "stop")
        self.steps = 0  # updates of the weights since the run began; a checkpoint restores it
        self.skipped = 0  # steps left out, one after the other
        self.notice: Callable[[str], None] = say
        self.store: dist.Store | None = None
        self.watch: FailureWatch | None = None
        self._memory: BatchMemory | None = None
        self._micro_batches = 0  # accumulated since the last step
        self._names: dict[nn.Parameter, str] = {}

    # ---- devices and processes ----

    def setup_device(self, device_flag: str = "auto") -> torch.device:
        """Choose this rank's device and start the process group (gloo on CPU; NCCL, with gloo beside it, on
        GPU).

        Args:
            device_flag: auto, cpu, cuda or cuda:N.
        """
        use_cuda = torch.cuda.is_available() if device_flag == "auto" else device_flag.startswith("cuda")
        if not use_cuda:
            self.device = torch.device("cpu")
        elif ":" in device_flag and self.world_size == 1:
            self.device = torch.device(device_flag)
        else:
            self.device = torch.device("cuda", self.topology.device_index(torch.cuda.device_count()))
        if use_cuda:
            torch.cuda.set_device(self.device)
        self.topology.export_environment()
        if self.needs_process_group or self.world_size > 1:
            self._start_process_group()
        return self.device

    def _start_process_group(self) -> None:
        if dist.is_initialized():
            return
        url = getattr(self.args, "dist_url", None) or "env://"
        minutes = float(getattr(self.args, "dist_timeout", None) or 10)
        backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            store, rank, world_size = next(
                dist.rendezvous(url, self.rank, self.world_size, timeout=timedelta(minutes=minutes))
            )
        except (ValueError, RuntimeError, dist.DistError) as error:
            where = f"{self.topology.master_addr}:{self.topology.master_port}" if url == "env://" else url
            reason = first_line(error)
            raise UserError(
                f"rank {self.rank} of {self.world_size} cannot meet the others at {where}: {reason}"
            ) from error
        self.store = store
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=minutes)
        )
        if world_size > 1:
            self.watch = FailureWatch(store, rank, world_size)
            self.watch.start()

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all ranks, on all ranks; ``tensor`` itself is left alone."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def any_rank(self, flag: bool | Tensor) -> bool:
        """Whether ``flag`` is true on at least one rank; every rank must ask."""
        if self.world_size == 1:
            return bool(flag)
        raised = torch.as_tensor(flag, device=self.device).to(torch.float32).reshape(1)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def gather_objects(self, value: Any) -> list[Any]:
        """One small plain value from every rank, in the order of ranks, on all ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` (a small picklable object) on all ranks."""
        return self.gather_objects(value if self.is_main else None)[0]

    def close(self) -> None:
        """Leave the process group; call it once, at the end of a run that went well."""
        self.barrier()
        if self.watch is not None:
            self.watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---- training ----

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        """Take over the network: move, split and wrap it, and make its optimizer and schedule.

        Sets ``model`` (call it to run forward), ``module`` (the plain network, with torchvision's names),
        ``optimizer`` and ``scheduler`` (``scheduler.step()`` is called once an epoch).
        """
        if getattr(self.args, "sync_bn", False) and self.world_size > 1:
            model = convert_batch_norm(model)
        self.module = model.to(self.device)
        if self.contiguous_weights:
            for parameter in self.module.parameters():
                # not contiguous(): a 1 x 1 kernel counts as contiguous with any strides
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._names = parameter_names(self.module)
        self._prepare(make_optimizer, make_scheduler)
        self._memory = BatchMemory(self.module)

    @abstractmethod
    def _prepare(self, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        """Set ``self.model``, ``self.optimizer``, ``self.scheduler`` from ``self.module``."""

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Type of mixed-precision computing: bfloat16 on a GPU unless --disable-amp, None on the CPU."""
        if self.device.type != "cuda" or getattr(self.args, "disable_amp", False):
            return None
        return torch.bfloat16

    @property
    def closes_step(self) -> bool:
        """Whether the micro-batch now running is the last one before an update."""
        return self._micro_batches + 1 >= self.accumulation

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward and loss: mixed precision, and no reduction before the last micro-batch."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the mean loss of a micro-batch.

        A loss that is not finite makes every gradient NaN, on all ranks once they are averaged, where
        ``step`` finds it. (The reverse does not hold in a spiking network: NaN drives no neuron over its
        threshold, so the loss can be finite while the gradients are not.)
        """
        loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan).to(loss.dtype)
        self._backward(loss)
        self._micro_batches += 1

    def _backward(self, loss: Tensor) -> None:
        (loss / self.accumulation if self.accumulation > 1 else loss).backward()

    def step(self) -> StepResult:
        """Update the weights, once ``--gradient-accumulation`` micro-batches have been backpropagated.

        Where gradients are not finite the step is left out on all ranks (--on-nan skip), or the run ends.

        Raises:
            NonFiniteLossError: the gradients are not finite (--on-nan stop), or were not too often in a
                row. The
                weights are those from before the step.
        """
        if self._micro_batches < self.accumulation:
            return StepResult(None, False)
        self._micro_batches = 0
        result = self._step()
        if result.skipped:
            self._not_finite()
        else:
            self.steps += 1
            self.skipped = 0
        return result

    def _step(self) -> StepResult:
        norm = self._gradient_norm()
        if not math.isfinite(float(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            return StepResult(norm, False, skipped=True)
        if self.clip_grad_norm > 0:
            self._clip(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, True)

    def _gradient_norm(self) -> Tensor:
        """Norm of all gradients together, the same on all ranks."""
        return get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def _clip(self, norm: Tensor) -> None:
        clip_grads_with_norm_(self.module.parameters(), self.clip_grad_norm, norm)

    def _not_finite(self) -> None:
        """Report gradients that are not finite; returns where the run goes on without the step."""
        assert self._memory is not None
        places = self.gather_objects(self._memory.trace(self.autocast))
        found = [(rank, place) for rank, place in enumerate(places) if place]
        text = f"step {self.steps + 1}: the gradients are not finite"
        if found:
            text += f"; NaN or infinity first appears in {found[0][1]}, on rank {found[0][0]}"
            text += f" and {len(found) - 1} more" if len(found) > 1 else ""
        else:
            text += ", though every layer's output is"
        self.skipped += 1
        if self.on_nan == "stop" or self.skipped >= PATIENCE:
            more = f"; {self.skipped} steps in a row were left out" if self.skipped > 1 else ""
            raise NonFiniteLossError(text + more)
        if self.is_main:
            self.notice(f"{text}; this step is left out on all ranks")

    def end_epoch(self) -> None:
        """Step the schedule; a schedule from a DeepSpeed JSON goes by updates instead and stays as it is."""
        if self.scheduler is not None:
            self.scheduler.step()

    # ---- evaluation ----

    @property
    def evaluation_model(self) -> nn.Module:
        """What to call for evaluation. All ranks must run the same number of batches (empty ones count)."""
        return self.model

    def sync_buffers(self) -> None:
        """Give all ranks the mean of their running statistics.

        Running statistics are linear in the batches seen, so it does not matter when, or how often, they are
        averaged: the result is the same as if every rank's updates had been averaged all along.
        """
        self.average_tensors(list(persistent_buffers(self.module).values()))

    def average_tensors(self, tensors: list[Tensor]) -> None:
        """Replace floating tensors by their mean over ranks, in place (one reduction for all of them)."""
        tensors = [t for t in tensors if t.is_floating_point()]
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().reshape(-1).to(torch.float64) for t in tensors]).to(self.device)
        dist.all_reduce(flat)
        flat /= self.world_size
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    # ---- state ----

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

    def load_train_state(self, values: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Put back what ``train_state`` gave, from the runs that ``shards_to_load`` asked for; collective.

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
        for group, saved in zip(self.optimizer.param_groups, plain["groups"], strict=True):
            restore_options(group, saved["options"])
        if self.scheduler is not None and plain["scheduler"] is not None:
            self.scheduler.load_state_dict(plain["scheduler"])

    def full_model_state(self) -> dict[str, Tensor]:
        """Whole weights and buffers on the CPU under torchvision's keys; empty on other ranks than 0."""
        self.sync_buffers()
        if not self.is_main:
            return {}
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}


def convert_batch_norm(model: nn.Module) -> nn.Module:
    """Make every BatchNorm layer of ``model`` compute its statistics over all ranks (--sync-bn)."""
    from scalesnn.parallel.sync_batch_norm import convert_sync_batch_norm

    return convert_sync_batch_norm(model)


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
            "give the same --norm-weight-decay as the run that wrote it"
        )


def some(names: list[str], limit: int = 3) -> str:
    """The first few of many."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def say(text: str) -> None:
    """One line on standard error."""
    print(f"scalesnn: {text}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
