"""DeepSpeed: ZeRO 0 (like DDP), 1 (optimizer state split), 2 (gradients too), 3 (weights too), with
offload."""

from __future__ import annotations

import logging
import math
import os
import sysconfig
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalesnn.base import UserError
from scalesnn.parallel.build_locks import clear_stale_locks
from scalesnn.parallel.deepspeed_builds import build_problem, builder_of, use_writable_extensions_folder
from scalesnn.parallel.deepspeed_config import read_config, resolve_config
from scalesnn.parallel.deepspeed_names import check_names
from scalesnn.parallel.state import Shard, shard_of, write_values
from scalesnn.parallel.strategy import MakeOptimizer, MakeScheduler, StepResult, Strategy, first_line
from scalesnn.parallel.topology import Topology
from scalesnn.parallel.zero_state import PartitionedGroups, PartitionedParameters

__all__ = ["DeepSpeedStrategy", "EngineSchedule"]


class EngineSchedule:
    """The schedule that a JSON defines: DeepSpeed moves it on at every update, so the epoch's step does
    nothing."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def step(self) -> None:
        """Do nothing; ``engine.step`` has moved the schedule."""

    def state_dict(self) -> dict[str, Any]:
        """State of the schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the schedule."""
        self.schedule.load_state_dict(state)

    def get_last_lr(self) -> list[float]:
        """The rates now in use."""
        return self.schedule.get_last_lr()


class DeepSpeedStrategy(Strategy):
    """Train with a DeepSpeed engine made from ``--deepspeed_config``.

    The Trainer's optimizer is the engine's client optimizer, and its schedule is stepped once an epoch,
    unless the JSON has sections ``optimizer`` or ``scheduler``. ``args`` takes batch size, accumulation,
    clipping and learning rate from the JSON (see :mod:`scalesnn.parallel.deepspeed_config`).
    """

    name = "deepspeed"
    contiguous_weights = True
    engine: Any

    def __init__(self, args: Any, topology: Topology) -> None:
        path = args.deepspeed_config
        self.config = resolve_config(read_config(path), args, topology.world_size, path=path)
        super().__init__(args, topology)
        self.stage: int = self.config.get("zero_optimization", {}).get("stage", 0)
        self._parts: PartitionedGroups | PartitionedParameters | None = None
        self._groups: list[list[str]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def setup_device(self, device_flag: str = "auto") -> torch.device:
        device = super().setup_device(device_flag)
        if device.type == "cuda":
            # DeepSpeed takes cuda:LOCAL_RANK, but under --gpus-per-task=1 a task's only GPU is number 0.
            os.environ["LOCAL_RANK"] = str(device.index)
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        deepspeed = import_deepspeed(verbose=getattr(self.args, "verbose", False))
        check_names(self.config, self.args.deepspeed_config)
        check_nvme(self.config, self.args.deepspeed_config)
        if device.type == "cpu":
            # DeepSpeed would compile a shared-memory collective here, for inference only: over a minute,
            # and a compiler needed, on every new machine. Its table of usable ops says whether to.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.topology.local_rank == 0:
            clear_stale_locks()
        self.barrier()
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
        return device

    @property
    def sharding(self) -> str:
        return f"zero{self.stage}"

    @property
    def amp_dtype(self) -> torch.dtype | None:
        section = self.config.get("torch_autocast") or {}
        return torch.bfloat16 if section.get("enabled") else None

    def _prepare(self, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        import deepspeed

        if super().amp_dtype is not None:
            self.config.setdefault("torch_autocast", {"enabled": True, "dtype": "bfloat16"})
        self._settle_optimizer()
        own = self.config.get("optimizer")
        client = make_optimizer(self.module)
        groups = [g for g in client.param_groups if g["params"]]
        self._groups = [[self._names[p] for p in group["params"]] for group in groups]
        self._shapes = {name: tuple(p.shape) for p, name in self._names.items()}
        scaled = ("lr",) if getattr(self.args, "lr_scale", None) else ()
        if scaled and self.config.get("scheduler"):
            raise UserError(
                f"{self.args.deepspeed_config}: its scheduler gives all parameters one rate, so --lr-scale "
                "has no effect: leave the scheduler out of the JSON"
            )
        parameters = [
            {"weight_decay": 0.0, **{k: g[k] for k in ("params", "weight_decay", *scaled) if k in g}}
            for g in groups
        ]
        scalars = self._broadcast_scalars()
        try:
            self.engine, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=None if own else client,
                model_parameters=parameters if own else None,
                config=self.config,
                dist_init_required=False,
            )
        except (AssertionError, TypeError, ValueError) as error:  # DeepSpeed's own checks of the JSON
            raise UserError(
                f"{self.args.deepspeed_config}: DeepSpeed refuses it: {first_line(error)}"
            ) from error
        finally:
            for scalar in scalars:
                del scalar.ds_optim_param  # type: ignore[attr-defined]
        self.model = self.engine
        self.optimizer = self.engine.basic_optimizer
        if self.stage == 3:
            self._parts = PartitionedParameters(self.engine.optimizer, self._names, self._shapes)
        elif self.stage:
            self._parts = PartitionedGroups(self.engine.optimizer, self._names, self._shapes)
        if self.engine.lr_scheduler is not None:
            self.scheduler = EngineSchedule(self.engine.lr_scheduler)
        else:
            self.scheduler = make_scheduler(self.optimizer)

    def _settle_optimizer(self) -> None:
        """Where the JSON has an Adam that DeepSpeed cannot compile here, take torch's, on all ranks.

        Raises:
            UserError: another optimizer that it cannot compile, or ``"torch_adam": false`` in the JSON.
        """
        own = self.config.get("optimizer")
        if not own:
            return
        kind = str(own.get("type"))
        parameters = own["params"] = own.get("params") or {}
        is_adam = kind.lower() in ("adam", "adamw")
        if is_adam and self.device.type == "cpu":
            parameters.setdefault(
                "torch_adam", True
            )  # compiling for minutes pays on a GPU or with offload only
        builder = builder_of(self.config)
        if builder is None:
            return
        reasons = self.gather_objects(build_problem(builder) if self.topology.local_rank == 0 else None)
        reason = next(filter(None, reasons), None)
        if reason is None:
            return
        if not is_adam or "torch_adam" in parameters:
            raise UserError(
                f"{self.args.deepspeed_config}: DeepSpeed cannot compile its {kind}: {reason}; leave the "
                "optimizer out of the JSON and give --opt"
            )
        parameters["torch_adam"] = True
        self.config["zero_force_ds_cpu_optimizer"] = False
        if self.is_main:
            self.notice(
                f"DeepSpeed cannot compile its {kind} ({reason}): torch's is used, with the same results"
            )

    def _broadcast_scalars(self) -> list[nn.Parameter]:
        """Take rank 0's scalar parameters (ParametricLIFNode's ``w``). DeepSpeed 0.19 cannot broadcast a
        scalar: at stages 0 to 2 it is told to leave them out, at stage 3 they become tensors of one
        value."""
        scalars = [p for p in self._names if p.ndim == 0]
        for scalar in scalars:
            scalar.ds_optim_param = True  # type: ignore[attr-defined]
            if self.world_size > 1:
                dist.broadcast(scalar.detach(), src=0)
            if self.stage == 3:
                scalar.data = scalar.data.view(1)
        return scalars

    def _backward(self, loss: Tensor) -> None:
        self.engine.set_gradient_accumulation_boundary(self.closes_step)
        self.engine.backward(loss)
        if not self.closes_step:
            self.engine.step()  # counts the micro-batch

    def _step(self) -> StepResult:
        if self.stage == 0:
            norm = self._gradient_norm()
            if not math.isfinite(float(norm)):
                self.engine.zero_grad()
                return StepResult(norm, False, skipped=True)
            self.engine.step()
            return StepResult(norm, True)
        self.engine.step()  # leaves a step out by itself when the gradients' norm is not finite
        bad = bool(self.engine.optimizer.overflow)
        return StepResult(self.engine.get_global_grad_norm(), not bad, skipped=bad)

    def _norms_of(self, weights: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        if self.stage == 0:
            return super()._norms_of(weights)
        from deepspeed.utils import safe_get_full_grad

        gradients = ((p, safe_get_full_grad(p)) for p in weights)  # one whole gradient at a time
        return {p: gradient.norm() for p, gradient in gradients if gradient is not None}

    @property
    def evaluation_model(self) -> nn.Module:
        return self.module  # stage 3 gathers weights in hooks of the modules themselves

    def close(self) -> None:
        self.barrier()
        self.engine.destroy()
        super().close()

    # ---- state ----

    def renew_schedule(self, rates: list[float], saved: Mapping[str, Any]) -> None:
        if isinstance(self.scheduler, EngineSchedule):  # the JSON's: only its place in the run is restored
            self.scheduler.load_state_dict(dict(saved))
        else:
            super().renew_schedule(rates, saved)

    def group_names(self) -> list[list[str]]:
        return self._groups

    def _frozen(self) -> dict[nn.Parameter, str]:
        """Parameters that are not trained, which ZeRO's optimizer does not know."""
        trained = {name for group in self._groups for name in group}
        return {p: name for p, name in self._names.items() if name not in trained or not p.requires_grad}

    def parameter_shards(self) -> dict[str, Shard]:
        if self._parts is None:
            return super().parameter_shards()
        shards = self._parts.parameter_shards()
        for parameter, name in self._frozen().items():
            shards[name] = self._frozen_shard(parameter, name)
        return shards

    def _frozen_shard(self, parameter: nn.Parameter, name: str) -> Shard:
        if self.stage < 3:
            return shard_of(parameter)
        part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        start = self.rank * part.ds_numel
        held = max(0, min(part.ds_numel, torch.Size(self._shapes[name]).numel() - start))
        return Shard(part.detach().view(-1)[:held], start, self._shapes[name])

    def write_parameters(self, values: Mapping[str, Tensor]) -> None:
        if self._parts is None:
            return super().write_parameters(values)
        for parameter, name in self._frozen().items():
            if name in values:
                if self.stage < 3:
                    write_values(parameter, values[name])
                else:
                    self._frozen_shard(parameter, name).values.copy_(values[name])
        self._parts.write_parameters(values)

    def optimizer_shards(self) -> dict[str, Shard]:
        return super().optimizer_shards() if self._parts is None else self._parts.optimizer_shards()

    def write_optimizer(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self._parts is None:
            super().write_optimizer(saved)
        else:
            self._parts.write_optimizer(saved)

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def full_model_state(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return super().full_model_state()
        import deepspeed

        self.sync_buffers()
        state: dict[str, Tensor] = {}
        for parameter, name in self._names.items():
            with deepspeed.zero.GatheredParameters([parameter], enabled=True):
                if self.is_main:
                    state[name] = parameter.detach().cpu().clone().view(self._shapes[name])
        if not self.is_main:
            return {}
        order = self.module.state_dict(keep_vars=True)
        return {n: state[n] if n in state else value.detach().cpu().clone() for n, value in order.items()}


def check_nvme(config: dict[str, Any], path: str) -> None:
    """Look whether this machine can do what ``offload_*.device: nvme`` asks of it.

    Raises:
        UserError: the folder cannot be written, or libaio is missing.
    """
    zero = config.get("zero_optimization") or {}
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name) or {}
        if section.get("device") != "nvme":
            continue
        folder = section.get("nvme_path")
        if not folder or not os.access(folder, os.W_OK):
            raise UserError(
                f"{path}: zero_optimization.{name}.nvme_path must be a folder on the NVMe that can be "
                f"written, got {folder!r}"
            )
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                f"{path}: zero_optimization.{name}.device nvme needs libaio, which is not on this machine: "
                'install libaio-dev (Debian) or libaio-devel (RPM), or write "device": "cpu"'
            )


def import_deepspeed(*, verbose: bool) -> Any:
    """Import DeepSpeed; its chatter below errors is kept off the console unless ``verbose``.

    Raises:
        UserError: it is not installed.
    """
    # Its run-time builds call `ninja`, which pip puts beside python: there too when no environment is
    # activated.
    use_writable_extensions_folder()
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"--strategy deepspeed needs the package deepspeed: {first_line(error)}") from None
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    return deepspeed
