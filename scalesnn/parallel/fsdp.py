"""FSDP2: weights, gradients and optimizer state split over ranks, gathered one residual block at a time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scalesnn.base import UserError
from scalesnn.configs import find_config
from scalesnn.parallel.strategy import MakeOptimizer, MakeScheduler, StepResult, Strategy
from scalesnn.parallel.topology import Topology

__all__ = ["FSDPConfig", "FSDPStrategy", "cast_inputs", "residual_blocks"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FSDPConfig:
    """The settings of ``--fsdp-config``.

    Attributes:
        mesh: ``fsdp`` splits over all ranks; ``hsdp`` splits over the ranks of a node and replicates over
            nodes. replicas: of hsdp: ``auto`` (one for each node), or how many. reshard_after_forward: free
            a block's gathered weights after its forward pass. param_dtype: of gathered weights: float32,
            bfloat16, or auto (bfloat16 on a GPU unless ``--disable-amp``). reduce_dtype: of gradients on
            their way: float32 or bfloat16. cpu_offload: keep what is split in host memory.
    """

    mesh: str = "fsdp"
    replicas: str | int = "auto"
    reshard_after_forward: bool = True
    param_dtype: str = "auto"
    reduce_dtype: str = "float32"
    cpu_offload: bool = False

    @classmethod
    def read(cls, path: str | None) -> FSDPConfig:
        """Read a YAML file; None gives the defaults.

        Raises:
            UserError: it cannot be read, or has a key or value that does not exist.
        """
        if path is None:
            return cls()
        try:
            settings = (
                yaml.safe_load(find_config("--fsdp-config", path, "[fh]sdp.yaml").read_text(encoding="utf-8"))
                or {}
            )
        except OSError as error:
            raise UserError(f"--fsdp-config {path}: {error.strerror or error}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"--fsdp-config {path}{line}: not valid YAML") from None
        if not isinstance(settings, dict):
            raise UserError(f"--fsdp-config {path}: expected lines of the form 'key: value'")
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"
                raise UserError(f"--fsdp-config {path}: unknown setting {key!r}{hint}")
        config = cls(**settings)
        config.check(path)
        return config

    def check(self, path: str) -> None:
        """Raise UserError for a value that does not exist."""
        choices: dict[str, Iterable[Any]] = {
            "mesh": ("fsdp", "hsdp"),
            "param_dtype": ("auto", *DTYPES),
            "reduce_dtype": tuple(DTYPES),
            "reshard_after_forward": (True, False),
            "cpu_offload": (True, False),
        }
        for key, values in choices.items():
            value = getattr(self, key)
            if not any(value is v or (isinstance(v, str) and value == v) for v in values):
                given = ", ".join(str(v).lower() for v in values)
                raise UserError(f"--fsdp-config {path}: {key} must be one of {given}, got {value!r}")
        whole = isinstance(self.replicas, int) and not isinstance(self.replicas, bool) and self.replicas >= 1
        if not whole and self.replicas != "auto":
            raise UserError(
                f"--fsdp-config {path}: replicas must be auto or at least 1, got {self.replicas!r}"
            )


class FSDPStrategy(Strategy):
    """Train with FSDP2.

    One group of weights for each residual block, one for the rest. Under mixed precision the normalisation
    layers of a block are a group of their own that stays in float32. Scalar parameters (ParametricLIFNode's
    ``w``) cannot be split: they stay whole, and their gradients are averaged.
    """

    name = "fsdp"
    contiguous_weights = True

    def __init__(self, args: Any, topology: Topology) -> None:
        self.config = FSDPConfig.read(args.fsdp_config)
        super().__init__(args, topology)
        self.mesh_shape = self._mesh_shape()
        self._scalars: list[nn.Parameter] = []

    def _mesh_shape(self) -> tuple[int, ...]:
        if self.config.mesh == "fsdp":
            return (self.world_size,)
        if self.config.replicas == "auto":
            return self.topology.mesh_shape
        replicas = int(self.config.replicas)
        if self.world_size % replicas:
            raise UserError(
                f"--fsdp-config {self.args.fsdp_config}: replicas is {replicas}, but {self.world_size} "
                "process(es) cannot be shared out evenly among them"
            )
        return (replicas, self.world_size // replicas)

    def _mesh(self) -> DeviceMesh:
        names = ("shard",) if len(self.mesh_shape) == 1 else ("replicate", "shard")
        return init_device_mesh(self.device.type, self.mesh_shape, mesh_dim_names=names)

    @property
    def param_dtype(self) -> torch.dtype | None:
        """Type of gathered weights; None: as they are."""
        if self.config.param_dtype == "auto":
            return self.amp_dtype
        dtype = DTYPES[self.config.param_dtype]
        return None if dtype == torch.float32 else dtype

    def _prepare(self, make_optimizer: MakeOptimizer, make_scheduler: MakeScheduler) -> None:
        self._take_weights_of_rank_0()
        self._scalars = [p for p in self.module.parameters() if p.ndim == 0]
        pinned = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.config.cpu_offload else OffloadPolicy()
        reduce_dtype: torch.dtype | None = DTYPES[self.config.reduce_dtype]
        if self.param_dtype is None and reduce_dtype == torch.float32:
            reduce_dtype = None  # as the gradients are
        # FSDP's own cast of inputs would write a repeated image out T times: see cast_inputs
        policy = MixedPrecisionPolicy(self.param_dtype, reduce_dtype, cast_forward_inputs=False)
        full = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        common: dict[str, Any] = {
            "mesh": self._mesh(),
            "reshard_after_forward": self.config.reshard_after_forward,
            "offload_policy": offload,
            "ignored_params": set(self._scalars),
        }
        blocks = residual_blocks(self.module)
        for block in (*blocks, self.module):
            if self.param_dtype is not None:
                norms = norm_layers(block, skip=blocks if block is self.module else ())
                if norms:
                    fully_shard(norms, mp_policy=full, **common)
            fully_shard(block, mp_policy=policy, **common)
            if self.param_dtype is not None:
                block.register_forward_pre_hook(partial(cast_inputs, self.param_dtype), with_kwargs=True)
        self._names = {p: name for name, p in self.module.named_parameters()}
        self.model = self.module
        self.optimizer = make_optimizer(self.module)
        if self._scalars:  # one fused call cannot take split and whole parameters together
            for group in self.optimizer.param_groups:
                group.update({key: False for key in ("foreach", "fused") if key in group})
        self.scheduler = make_scheduler(self.optimizer)

    def _take_weights_of_rank_0(self) -> None:
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if self.world_size > 1:
                dist.broadcast(tensor.detach(), src=0)

    def _backward(self, loss: Tensor) -> None:
        whole: Any = self.module
        whole.set_requires_gradient_sync(self.closes_step)
        super()._backward(loss)

    def _step(self) -> StepResult:
        for scalar in self._scalars:
            if scalar.grad is not None and self.world_size > 1:
                dist.all_reduce(scalar.grad)
                scalar.grad /= self.world_size
        return super()._step()

    def _gradients(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters with gradients: those that are split, and those that are whole."""
        scalars = set(self._scalars)
        split = [p for p in self.module.parameters() if p.grad is not None and p not in scalars]
        return split, [p for p in self._scalars if p.grad is not None]

    def _gradient_norm(self) -> Tensor:
        squares = []
        for parameters in self._gradients():
            if parameters:
                part: Any = get_total_norm([p.grad for p in parameters if p.grad is not None])
                part = part.full_tensor() if hasattr(part, "full_tensor") else part
                squares.append(part.to(self.device).square())
        return torch.stack(squares).sum().sqrt()

    def _norms_of(self, weights: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        parts: dict[nn.Parameter, Any] = {p: p.grad for p in weights if p.grad is not None}
        if not parts:
            return {}
        norms = torch._foreach_norm([gradient.to_local() for gradient in parts.values()])
        squares = torch.stack(norms).to(self.device, torch.float64).square()
        replicas = self.mesh_shape[0] if len(self.mesh_shape) > 1 else 1
        return dict(zip(parts, (self.reduce_sum(squares) / replicas).sqrt().unbind(), strict=True))

    def _clip(self, norm: Tensor) -> None:
        for parameters in self._gradients():
            if parameters:
                clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)

    def full_model_state(self) -> dict[str, Tensor]:
        self.sync_buffers()
        state: dict[str, Tensor] = {}
        for name, value in self.module.state_dict().items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            if self.is_main:
                state[name] = whole.detach().cpu().clone()
        return state


def cast_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the floating-point tensors among a module's arguments in ``dtype``.

    A dimension that repeats one value (stride 0, as ``functional.repeat_over_time`` makes it) still does, so
    that the stem sees one image and not T copies of it.
    """

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        once = x
        for dimension, stride in enumerate(x.stride()):
            if stride == 0 and x.shape[dimension] > 1:
                once = once.narrow(dimension, 0, 1)
        return once.to(dtype).expand(x.shape)

    return tuple(cast(x) for x in args), {name: cast(x) for name, x in kwargs.items()}


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a residual network: members of its ``nn.Sequential`` stages that are made of several
    layers."""
    found: list[nn.Module] = []
    for stage in model.modules():
        if type(stage) is nn.Sequential:
            found += [m for m in stage if not isinstance(m, nn.Sequential) and layers_with_weights(m) > 1]
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    return [block for block in found if id(block) not in inner]


def layers_with_weights(module: nn.Module) -> int:
    """How many modules inside own parameters."""
    return sum(1 for m in module.modules() if any(True for _ in m.parameters(recurse=False)))


def norm_layers(module: nn.Module, skip: Iterable[nn.Module] = ()) -> list[nn.Module]:
    """Normalisation layers with weights inside ``module``, but not inside the modules in ``skip``."""
    inner = {id(part) for other in skip for part in other.modules()}
    is_norm: Callable[[nn.Module], bool] = lambda m: isinstance(m, _NormBase) and m.affine  # noqa: E731
    return [m for m in module.modules() if is_norm(m) and id(m) not in inner]
