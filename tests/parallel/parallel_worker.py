"""One rank of a distributed test: runs a list of training cells one after the other in the same processes.

``python parallel_worker.py CELLS.json RESULTS.json`` with RANK, WORLD_SIZE, … in the environment. Starting
processes is the expensive part, so a test session starts few and gives each many cells.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer would, in every rank anew
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.parallel import NonFiniteLossError, Topology, create_strategy
from scalesnn.parallel.deepspeed import import_deepspeed
from scalesnn.parallel.state import plain_options
from scalesnn.parallel.topology import free_port
from scalesnn.training.checkpoint import CheckpointManager, Progress
from scalesnn.training.ema import ModelEma
from scalesnn.training.fine_tuning import freeze, rate_factors
from scalesnn.training.init_from import initialise, locate, open_weights
from scalesnn.training.optimizers import parameter_groups

CLASSES, IMAGES, STEPS = 5, 12, 20
DEFAULTS: dict[str, Any] = {
    "strategy": "auto",
    "deepspeed_config": None,
    "deepspeed": False,
    "fsdp_config": None,
    "local_rank": None,
    "world_size": None,
    "dist_url": "env://",
    "dist_timeout": 2.0,
    "sync_bn": True,
    "clip_grad_norm": None,
    "gradient_accumulation": 1,
    "on_nan": "stop",
    "ddp_static_graph": False,
    "ddp_bf16_gradients": False,
    "ddp_broadcast_buffers": False,
    "disable_amp": True,
    "batch_size": 4,
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "opt": "sgd",
    "verbose": False,
    "explicit": [],
}


class Arguments:
    """Flags as attributes."""

    def __init__(self, flags: dict[str, Any]) -> None:
        unknown = set(flags) - set(DEFAULTS)
        assert not unknown, unknown
        self.__dict__.update({**DEFAULTS, **flags})
        self.explicit = set(self.explicit)


class TorchNorm(nn.Module):
    """torch's own BatchNorm2d, called as scalesnn's is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, neuron: nn.Module, residual: Tensor | None = None) -> Tensor:
        y = self.bn(x.flatten(0, 1)).view_as(x)
        return neuron(y if residual is None else y + residual)


def norm(kind: str, channels: int) -> nn.Module:
    """A normalisation layer: ``batch``, ``torch`` (torch's own), or ``group``, which does not mix images."""
    if kind == "torch":
        return TorchNorm(channels)
    return layer.BatchNorm2d(channels) if kind == "batch" else layer.GroupNorm(1, channels)


class Block(nn.Module):
    """A residual block of a spiking network."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv1 = layer.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = norm(kind, channels)
        self.sn1 = neuron.ParametricLIFNode(surrogate_function=surrogate.ATan())
        self.conv2 = layer.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(kind, channels)
        self.sn2 = neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), neuron=self.sn1)
        return self.bn2(self.conv2(y), neuron=self.sn2, residual=x)


class Net(nn.Module):
    """A small spiking ResNet with odd sizes, so that no split over ranks is even."""

    def __init__(self, kind: str = "batch", channels: int = 7) -> None:
        super().__init__()
        self.conv = layer.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = norm(kind, channels)
        self.sn = neuron.IFNode(surrogate_function=surrogate.ATan())
        self.layer1 = nn.Sequential(Block(channels, kind), Block(channels, kind))
        self.fc = layer.Linear(channels, CLASSES)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0).repeat(3, 1, 1, 1, 1)
        x = self.layer1(self.bn(self.conv(x), neuron=self.sn))
        return self.fc(x.mean((-1, -2))).mean(0)


def batches(dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
    """STEPS global batches of ``count`` images."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(STEPS, count, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, CLASSES, (STEPS, count), generator=generator)


def make_optimizer(args: Any, net: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW with BatchNorm's parameters in a group of their own."""
    norms = [p for n, p in net.named_parameters() if "bn" in n]
    others = [p for n, p in net.named_parameters() if "bn" not in n]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)


def fine_tuned(args: Any, net: nn.Module) -> torch.optim.Optimizer:
    """SGD with the rates of --lr-scale."""
    rates = {name: args.lr * factor for name, factor in rate_factors(net, args.lr_scale).items()}
    groups = parameter_groups(net, args.weight_decay, None, rates)
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)


def train(cell: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Train ``steps`` steps as the cell says; returns the loss trace and more."""
    dtype = getattr(torch, cell.get("dtype", "float32"))
    args = Arguments(cell.get("flags", {}))
    strategy = create_strategy(args, topology)
    strategy.patience = cell.get("patience", strategy.patience)
    strategy.setup_device("cpu")
    torch.manual_seed(cell.get("seed", 1))
    net = Net(cell.get("norm", "batch")).to(dtype)
    if "init_from" in cell:
        args.init_from, args.resume, args.output_dir, args.test_only = cell["init_from"], None, None, False
        initialise(args, net, [], strategy)
    freeze(net, cell.get("freeze", []))
    args.lr_scale = cell.get("lr_scale", [])
    strategy.prepare(
        net,
        lambda m: fine_tuned(args, m) if "init_from" in cell else make_optimizer(args, m),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    )
    begins_with = digest(strategy.full_model_state()) if "init_from" in cell else {}
    formats = watch_formats(net)
    ema = ModelEma(strategy, 0.8, steps=2) if cell.get("ema", True) else None
    folder = Path(cell["folder"]) if "folder" in cell else Path("unused")
    manager = CheckpointManager(
        folder, strategy, keep=cell.get("keep", 2), ema=ema, background=cell.get("background", False)
    )
    progress = Progress()
    extra: dict[str, Any] = {}
    if "resume" in cell:
        progress, extra = manager.load(cell["resume"], frozenset(cell.get("changed", ())))
    count = cell.get("images", IMAGES)
    images, targets = batches(dtype, count)
    losses, norms = [], []
    layer_norms: dict[str, float] = {}
    accumulation = strategy.accumulation
    share = count // accumulation // strategy.world_size
    done = progress.step  # global batches
    while done < cell.get("steps", STEPS):
        total = 0.0
        if cell.get("die", {}).get("step") == done and cell["die"]["rank"] == strategy.rank:
            if cell["die"]["how"] != "raise":
                os.kill(os.getpid(), signal.Signals[cell["die"]["how"]])
            raise RuntimeError("on purpose")
        for part in range(accumulation):
            begin = (part * strategy.world_size + strategy.rank) * share
            x, y = (t[done, begin : begin + share] for t in (images, targets))
            if done == cell.get("poison") and strategy.rank == 0:
                x = x.clone()
                x[0, 0, 0, 0] = float("nan")
            with strategy.autocast():
                loss = nn.functional.cross_entropy(strategy.model(x), y)
            strategy.backward(loss)
            functional.reset_net(strategy.module)
            assert not any(isinstance(m, neuron.BaseNode) and isinstance(m.v, Tensor) for m in net.modules())
            if done == 1 and strategy.gradients_complete:
                layer_norms = {name: float(value) for name, value in strategy.gradient_norms().items()}
            result = strategy.step()
            total += float(strategy.reduce_sum(loss)) / strategy.world_size / accumulation
        done += 1
        if result.skipped:
            losses.append(None)
            continue
        assert result.stepped
        norms.append(None if result.grad_norm is None else float(result.grad_norm))
        progress.step += 1
        losses.append(total)
        if ema is not None:
            ema.update(progress.step)
        if progress.step % 5 == 0:
            strategy.end_epoch()
            if cell.get("evaluate"):  # as the Trainer does between epochs; must leave no trace in training
                net.eval()
                with torch.inference_mode(), strategy.autocast():
                    strategy.evaluation_model(images[0])
                functional.reset_net(net)
                net.train()
        if progress.step in cell.get("save", []):
            manager.save(progress, extra={"losses": losses}, is_best=True)
    manager.wait()
    found: dict[str, Any] = {"losses": losses, "norms": norms, "extra": extra, "steps": progress.step}
    found["layer_norms"] = layer_norms
    found["formats"] = formats
    found["lr"] = strategy.optimizer.param_groups[0]["lr"]
    found["options"] = [plain_options(group) for group in strategy.optimizer.param_groups]
    state = strategy.full_model_state()
    found["weights"] = digest(state)
    if "init_from" in cell:
        found["begins_with"] = begins_with
        found["given"] = digest(open_weights(locate(cell["init_from"]) or "").tensors)
    if ema is not None:
        with ema.applied():
            state = strategy.full_model_state()
            found["ema"] = digest(state)
            net.eval()
            with torch.no_grad():
                found["ema_output"] = strategy.evaluation_model(images[0]).sum().item()
            functional.reset_net(net)
            net.train()
    found["optimizer_numel"] = sum(s.values.numel() for s in strategy.optimizer_shards().values())
    if hasattr(strategy, "engine"):
        strategy.engine.destroy()
    return found


def watch_formats(net: nn.Module) -> dict[str, bool]:
    """For every convolution, whether the output of its first call is channels_last."""
    found: dict[str, bool] = {}
    handles: dict[str, Any] = {}
    for name, module in net.named_modules():
        if isinstance(module, layer.Conv2d):

            def look(module: Any, inputs: Any, y: Tensor, name: str = name) -> None:
                found.setdefault(name, y[0].is_contiguous(memory_format=torch.channels_last))
                handles[name].remove()

            handles[name] = module.register_forward_hook(look)
    return found


def digest(state: dict[str, Tensor]) -> dict[str, list[float]]:
    """Few numbers for each tensor: sum, sum of squares, first value."""
    return {
        name: [
            value.double().sum().item(),
            value.double().square().sum().item(),
            value.double().flatten()[0].item(),
        ]
        for name, value in state.items()
    }


def run_rank(rank: int, world: dict[str, Any], port: int) -> None:
    """Be one rank: run all cells of its world; rank 0 writes what came of each."""
    size = world["size"]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    topology = Topology.from_environment()
    results: dict[str, Any] = {}
    for name, cell in world["cells"].items():
        try:
            results[name] = train(cell, topology)
        except (UserError, NonFiniteLossError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    if rank == 0:
        Path(world["results"]).write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def start_rank(rank: int, world: dict[str, Any], port: int) -> int:
    """Fork a rank; its output goes to files beside the results. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{world['results']}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        run_rank(rank, world, port)
        code = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_world(world: dict[str, Any]) -> list[int]:
    """Run the ranks of a world; returns their exit codes. Ranks that have stopped themselves are killed in
    the end."""
    port = free_port()
    children = [start_rank(rank, world, port) for rank in range(world["size"])]
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            if len(codes) == len(children) - 1:
                os.kill(child, signal.SIGKILL)
            continue
        codes[child] = os.waitstatus_to_exitcode(status)
        for other in set(children) - set(codes):
            if len(codes) == len(children) - 1 and is_stopped(other):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def main(worlds_path: str) -> None:
    """Run worlds one after the other and write the exit codes beside the results."""
    for world in json.loads(Path(worlds_path).read_text()):
        if any("deepspeed_config" in cell.get("flags", {}) for cell in world["cells"].values()):
            import_deepspeed(verbose=False)  # once, for all ranks
        codes = run_world(world)
        Path(f"{world['results']}.codes").write_text(json.dumps(codes))
        if any(codes) and not world.get("may_fail"):
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
