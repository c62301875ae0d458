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
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scalesnn.base import UserError
from scalesnn.kernels import self_check
from scalesnn.parallel.devices import check_gpu, first_line, unusable_gpu, use_expandable_segments
from scalesnn.parallel.failure import FailureWatch
from scalesnn.parallel.finite import PATIENCE, BatchMemory, NonFiniteLossError
from scalesnn.parallel.meeting import meet
from scalesnn.parallel.start_again import StartTogether, again
from scalesnn.parallel.state import parameter_names, persistent_buffers
from scalesnn.parallel.strategy_state import StrategyState, TrainState
from scalesnn.parallel.sync_batch_norm import convert_sync_batch_norm
from scalesnn.parallel.topology import Topology

__all__ = ["MakeOptimizer", "MakeScheduler", "StepResult", "Strategy", "TrainState"]

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class StepResult:
    """What ``Strategy.step`` did: the norm of the gradients before clipping where it is known, and whether
    the weights were updated."""

    grad_norm: Tensor | float | None
    stepped: bool
    skipped: bool = False


class Strategy(StrategyState, ABC):
    """How a network is trained on one or many devices. Subclasses fill in ``_prepare``, ``_backward``,
    ``_step`` and, where they split tensors in a way of their own, the state methods."""

    name: ClassVar[str]
    needs_process_group: ClassVar[bool] = True
    patience: float = 40.0  # seconds without a sign of life after which a rank counts as gone
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
        self.together: StartTogether | None = None
        self._memory: BatchMemory | None = None
        self._micro_batches = 0  # accumulated since the last step
        self._names: dict[nn.Parameter, str] = {}

    # ---- devices and processes ----

    def setup_device(self, device_flag: str = "auto") -> torch.device:
        """Choose this rank's device and start the process group (gloo on CPU; NCCL, with gloo beside it, on
        GPU).

        Args:
            device_flag: auto, cpu, cuda or cuda:N.

        Raises:
            UserError: the machine has an NVIDIA GPU that torch cannot use (unless ``device_flag`` is cpu), or
                fewer than processes.
        """
        use_cuda = torch.cuda.is_available() if device_flag == "auto" else device_flag.startswith("cuda")
        if device_flag == "auto" and (problem := unusable_gpu()):
            raise UserError(f"{problem}; --device cpu trains on the CPU all the same")
        if ":" in device_flag and self.world_size > 1:
            raise UserError(
                f"--device {device_flag} names one GPU, but there are {self.world_size} processes: "
                "give --device cuda, and each takes its own"
            )
        if not use_cuda:
            self.device = torch.device("cpu")
        elif ":" in device_flag:
            self.device = torch.device(device_flag)
        else:
            self.device = torch.device("cuda", self.topology.device_index(torch.cuda.device_count()))
        if use_cuda:
            use_expandable_segments()
            torch.cuda.set_device(self.device)
            check_gpu(self.device)
        if self.needs_process_group or self.world_size > 1:
            self.topology.export_environment()
            self._start_process_group()
        if use_cuda:
            self._agree_on_kernels()
        return self.device

    def _agree_on_kernels(self) -> None:
        """Where the fused kernels do not work on one rank's GPU, no rank uses them: fused and plain layers
        make different collectives."""
        reasons = (self_check.problem(self.device, dtype) for dtype in (torch.float32, torch.bfloat16))
        for rank, reason in enumerate(self.gather_objects(next(filter(None, reasons), None))):
            if reason is not None:
                self_check.give_up(f"on rank {rank}: {reason}")

    def _start_process_group(self) -> None:
        if dist.is_initialized():
            return
        url = getattr(self.args, "dist_url", None) or "env://"
        minutes = float(getattr(self.args, "dist_timeout", None) or 10)
        backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            store = meet(url, self.topology, timedelta(minutes=minutes))
        except UserError:
            raise
        except (ValueError, RuntimeError, dist.DistError) as error:
            where = f"{self.topology.master_addr}:{self.topology.master_port}" if url == "env://" else url
            reason = first_line(error)
            raise UserError(
                f"rank {self.rank} of {self.world_size} cannot meet the others at {where}: {reason}"
            ) from error
        if told := again():  # the store may be the launcher's, and still hold what the ranks said before
            store = dist.PrefixStore(f"again-{told.count}", store)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0":  # torchrun's static store still holds the addresses of the ranks before
            store = dist.PrefixStore(f"attempt_{attempt}", store)
        self.store, rank, world_size = store, self.rank, self.world_size
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=minutes)
        )
        if world_size > 1:
            self.watch = FailureWatch(store, rank, world_size, patience=self.patience)
            self.watch.start()
        announce = (lambda text: None) if self.watch is None else self.watch.announce
        self.together = StartTogether(store, rank, world_size, announce=announce)

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
        if self.together is not None:
            self.together.stop()
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
            model = convert_sync_batch_norm(model)
        self.module = model.to(self.device)
        if self.contiguous_weights:
            for parameter in self.module.parameters():
                # not contiguous(): a 1 x 1 kernel counts as contiguous with any strides
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._names = parameter_names(self.module)
        self.make_scheduler = make_scheduler
        self._prepare(make_optimizer, make_scheduler)
        self._memory = BatchMemory(self.module)

    @abstractmethod
    def _prepare(self, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        """Set ``self.model``, ``self.optimizer``, ``self.scheduler`` from ``self.module``."""

    @property
    def sharding(self) -> str:
        """What is split over ranks, as the memory planner names it: single, ddp, zero0 … zero3 or fsdp."""
        return self.name

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

    @property
    def gradients_complete(self) -> bool:
        """Whether the last micro-batch before an update has been backpropagated."""
        return self._micro_batches >= self.accumulation

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
        value = loss.detach()
        loss = loss * (1 + (value - value))  # 1, or NaN; torch.where would copy its numbers from the host
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
        if not self.gradients_complete:
            return StepResult(None, False)
        self._micro_batches = 0
        return self.count(self._step())

    def count(self, result: StepResult) -> StepResult:
        """Count a step that was taken, or deal with one that was left out; see ``step``."""
        self._micro_batches = 0
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

    def gradient_norms(self) -> dict[str, Tensor]:
        """The norm of every weight's gradient, reduced over ranks and micro-batches, by the parameter's name.

        Parameters with fewer than two dimensions are left out. Collective; call it between the last backward
        pass of a step and ``step``.
        """
        shapes = self.whole_shapes()
        weights = {p: name for p, name in self._names.items() if len(shapes[name]) > 1 and p.requires_grad}
        norms = self._norms_of(list(weights))
        return {name: norms[p] for p, name in weights.items() if p in norms}

    def _norms_of(self, weights: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Norms of the whole gradients of ``weights``; those without a gradient are left out."""
        gradients = {p: p.grad.detach() for p in weights if p.grad is not None}
        return dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))

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


def say(text: str) -> None:
    """One line on standard error."""
    print(f"scalesnn: {text}", file=sys.stderr, flush=True)
