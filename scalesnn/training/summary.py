"""What a run says of itself at its start: the network in a table, and how, where and on what it trains.

The table comes from one forward pass of a copy of the network whose tensors have sizes only
(FakeTensorMode), under the run's memory policy: nothing is computed or allocated.
"""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from scalesnn.base import MemoryModule
from scalesnn.kernels.unit import backend_name, usable
from scalesnn.memory import Policy, apply_policy, policy_of
from scalesnn.neuron import BaseNode
from scalesnn.parallel.strategy import Strategy
from scalesnn.training.fine_tuning import describe_fine_tuning
from scalesnn.training.numerics import numerics_of
from scalesnn.training.random_state import random_state, restore_random_state

if TYPE_CHECKING:
    from scalesnn.model.train_classify import Trainer

__all__ = ["Stage", "Summary", "introduce", "sample_shape", "stages_of", "summarise"]

MOST_ROWS = 20
MOST_CHUNKS = 4  # of time-steps that a trace runs through
NARROWEST = 100  # columns of what is printed to a file


@dataclass
class Stage:
    """A row of the table.

    Attributes:
        name: of the stage.
        modules: the net's children that belong to it.
        parameters: numbers that are learned.
        shape: of its output, of one image and time-step; None: unknown.
        neurons: spiking neurons (of one image); None: unknown.
        saved: bytes kept for the backward pass, of the whole batch; None: unknown.
    """

    name: str
    modules: list[nn.Module]
    parameters: int = 0
    shape: tuple[int, ...] | None = None
    neurons: int | None = None
    saved: int | None = None


@dataclass(frozen=True)
class Summary:
    """The stages of a net, and a line that says what of them is unknown and why; None: nothing."""

    stages: list[Stage]
    note: str | None


class _Counter(FakeTensorMode):
    """Remembers which storages were made while which stage ran."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = 0
        self.made: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                known = self.made.get(storage._cdata)
                if known is None or known[0]() is None:
                    self.made[storage._cdata] = weakref.ref(storage), self.stage
        return out

    def alive(self, apart_from: Sequence[Tensor]) -> Counter[int]:
        """Bytes that are alive now, by stage."""
        others = {tensor.untyped_storage()._cdata for tensor in apart_from}
        found: Counter[int] = Counter()
        for key, (reference, stage) in self.made.items():
            storage = reference()
            if storage is not None and key not in others:
                found[stage] += storage.nbytes()
        return found


def stages_of(net: nn.Module) -> list[Stage]:
    """The parts of a net: its children that have children of their own, and the runs of plain layers before
    (``stem``), between and after (``head``) them."""
    children = list(net.named_children())
    while len(children) == 1 and list(children[0][1].children()):  # net.body = Sequential(…)
        children = list(children[0][1].named_children())
    groups: list[tuple[bool, list[tuple[str, nn.Module]]]] = []
    has_blocks = any(not _is_plain(module) for _, module in children)
    for name, module in children:
        plain = has_blocks and _is_plain(module)
        if plain and groups and groups[-1][0]:
            groups[-1][1].append((name, module))
        else:
            groups.append((plain, [(name, module)]))
    rows = [members for _, members in groups]
    many = max(1, -(-len(rows) // MOST_ROWS))
    rows = [[m for row in rows[i : i + many] for m in row] for i in range(0, len(rows), many)]
    stages = [Stage(_name(members), [module for _, module in members]) for members in rows]
    if len(groups) > 1 and groups[0][0]:
        stages[0].name = "stem"
    if len(groups) > 1 and groups[-1][0]:
        stages[-1].name = "head"
    return stages or [Stage(type(net).__name__, [net])]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a single layer; a neuron is one, though its surrogate function is a module, too."""
    return isinstance(module, BaseNode) or not list(module.children())


def _name(members: list[tuple[str, nn.Module]]) -> str:
    names = [name for name, _ in members]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}"


def summarise(
    net: nn.Module,
    make_input: Callable[[], Tensor],
    *,
    training: bool = True,
    amp_dtype: torch.dtype | None = None,
) -> Summary:
    """Look at each stage of a net during one forward pass that computes nothing; the net is left as it is.

    Args:
        make_input: makes the net's input, [T, N, C, H, W] or [N, C, H, W]; called under FakeTensorMode.
        training: whether tensors are kept for a backward pass.
        amp_dtype: of autocast; None: without.
    """
    stages = stages_of(net)
    owners = {
        id(m): i for i, stage in reversed(list(enumerate(stages))) for c in stage.modules for m in c.modules()
    }
    counted: set[int] = set()
    for i, stage in enumerate(stages):
        own = {id(p): p.numel() for m in stage.modules for p in m.parameters() if id(p) not in counted}
        stages[i].parameters = sum(own.values())
        counted |= set(own)
    if rest := {id(p): p.numel() for p in net.parameters() if id(p) not in counted}:
        stages.append(Stage("(the net's own)", [], sum(rest.values())))
    state, note = random_state(), None
    try:
        with FakeCopyMode(mode := _Counter()):
            twin = copy.deepcopy(net).train(training)
        place = {
            id(t): owners[id(m)]
            for t, m in zip(twin.modules(), net.modules(), strict=True)
            if id(m) in owners
        }
        with mode:
            x = make_input()
        if training and _is_long(net, x):
            apply_policy(twin, Policy())
            note = f"saved bytes are not shown: {policy_of(net)} cuts T into many chunks; ask scalesnn plan"
        device = next((p.device.type for p in twin.parameters()), "cpu")
        autocast = nullcontext() if amp_dtype is None else torch.autocast(device, amp_dtype)
        with mode, torch.set_grad_enabled(training), _watched(mode, place, stages, x), autocast:
            y = twin(x)
            del y
        _count(twin, mode, place, stages, x)
        if note is not None or not training:
            for stage in stages:
                stage.saved = None
    except Exception as error:  # a net of the user's own may do anything
        reason = (str(error).strip().splitlines() or [""])[0][:80]
        note = f"shapes, neurons and saved bytes are not shown: the network cannot be traced ({reason})"
        for stage in stages:
            stage.shape = stage.neurons = stage.saved = None
    finally:
        restore_random_state(state)
    return Summary(stages, note)


def _is_long(net: nn.Module, x: Tensor) -> bool:
    """Whether the policy runs so many chunks of time-steps that a trace would take seconds."""
    steps = policy_of(net).steps
    return x.dim() == 5 and 0 < steps < x.shape[0] / MOST_CHUNKS


@contextmanager
def _watched(mode: _Counter, place: dict[int, int], stages: list[Stage], x: Tensor) -> Iterator[None]:
    """Follow the forward pass through the stages. The hooks are global ones: with hooks of its own a module
    would be run in another way."""
    steps, batch = (x.shape[0], x.shape[1]) if x.dim() == 5 else (1, x.shape[0])

    def enter(module: nn.Module, inputs: Any) -> None:
        mode.stage = place.get(id(module), mode.stage)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        found = place.get(id(module))
        if found is not None and isinstance(output, Tensor):
            stages[found].shape = of_one(tuple(output.shape), steps, batch, x.dim() == 5)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def of_one(shape: tuple[int, ...], steps: int, batch: int, is_sequence: bool) -> tuple[int, ...]:
    """The shape of one image and time-step, of a whole output's: without T, N, or both as one dimension."""
    if is_sequence and len(shape) > 1 and shape[1] == batch and shape[0] <= steps:
        return shape[2:]
    return shape[1:] if shape[:1] and shape[0] in (batch, steps * batch) else shape


def _count(twin: nn.Module, mode: _Counter, place: dict[int, int], stages: list[Stage], x: Tensor) -> None:
    """Neurons and saved bytes of each stage, after the forward pass."""
    batch = x.shape[-4]
    memories = [v for m in twin.modules() if isinstance(m, MemoryModule) for v in m.memories()]
    own = [*twin.parameters(), *twin.buffers(), *(v for v in memories if isinstance(v, Tensor)), x]
    saved = mode.alive(own)
    for i, stage in enumerate(stages):
        stage.neurons, stage.saved = 0, saved[i]
    for module in twin.modules():
        if isinstance(module, BaseNode) and isinstance(module.v, Tensor) and id(module) in place:
            stage = stages[place[id(module)]]
            stage.neurons = (stage.neurons or 0) + module.v.numel() // batch


# ------------------------------------------------------------------------------------------------ printing
def table_of(summary: Summary) -> Table:
    """The stages as a table with totals; columns of which nothing is known are left out."""
    stages = summary.stages
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("stage", "total", no_wrap=True)
    columns = [[stage.name for stage in stages]]

    def add(head: str, cells: list[str], total: str = "") -> None:
        table.add_column(head, total, justify="right", no_wrap=True)
        columns.append(cells)

    traced = any(stage.shape is not None for stage in stages)
    if traced:
        add("output", [" × ".join(map(str, stage.shape or ())) for stage in stages])
    add("parameters", [f"{s.parameters:,}" for s in stages], f"{sum(s.parameters for s in stages):,}")
    if traced:
        neurons = [stage.neurons or 0 for stage in stages]
        add("neurons", [f"{count:,}" for count in neurons], f"{sum(neurons):,}")
    if any(stage.saved is not None for stage in stages):
        saved = [stage.saved or 0 for stage in stages]
        add("saved for backward", [readable(size) for size in saved], readable(sum(saved)))
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def readable(size: int) -> str:
    """Bytes for people: ``0 B``, ``12.3 KiB``, ``1.07 GiB``."""
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.3g} {'KMGT'[power - 1]}iB"


def sample_shape(args: Any, data: Any) -> tuple[int, ...]:
    """The shape of one training sample: [C, H, W] of an image, [T, C, H, W] of event frames."""
    images = getattr(data, "sample_shape", (3, args.train_crop_size, args.train_crop_size))
    return tuple(getattr(data, "frames_shape", None) or images)


def introduce(
    trainer: Trainer, args: Any, folder: Path, data: Any, net: nn.Module, strategy: Strategy
) -> None:
    """Print the summary of a run that begins, on rank 0; the whole net goes to ``folder/model.txt``.

    Call it before the strategy takes the net over.
    """
    if not strategy.is_main:
        return
    shape = (args.batch_size, *sample_shape(args, data))

    def make_input() -> Tensor:
        return trainer.preprocess_train_sample(args, torch.zeros(shape))

    summary = summarise(net, make_input, training=not args.test_only, amp_dtype=strategy.amp_dtype)
    width = None if sys.stdout.isatty() else NARROWEST
    console = Console(file=sys.stdout, width=width, highlight=False, no_color=True)
    with console.capture() as captured:
        console.print(table_of(summary))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    lines += [] if summary.note is None else [summary.note]
    facts = describe(args, data, net, strategy)
    if not args.test_only:
        (folder / "model.txt").write_text(f"{net}\n", encoding="utf-8")
        facts["run"] = f"{folder.resolve()} (the whole network: model.txt)"
    lines += [f"{name:<10} {text}" for name, text in facts.items()]
    print(*lines, sep="\n", flush=True)


def describe(args: Any, data: Any, net: nn.Module, strategy: Strategy) -> dict[str, str]:
    """What the run is made of: batch, backend, loader, strategy, devices, precision."""
    device, topology = strategy.device, strategy.topology
    nodes = [m for m in net.modules() if isinstance(m, BaseNode)]
    kinds = Counter(f"{type(n).__name__} ({type(n.surrogate_function).__name__})" for n in nodes)
    probe = torch.empty(1, device=device, dtype=strategy.amp_dtype)
    plain = sum(not usable(probe, node.backend) for node in nodes)
    backend = backend_name(device) if plain < len(nodes) else "plain torch"
    if 0 < plain < len(nodes):
        backend += f", {plain} of them in plain torch"
    loader = type(data.train).__name__.removesuffix("Loader").lower()
    images = getattr(data.train, "number_of_images", None)
    many = f", {images:,} training images" if images is not None else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f" on {topology.nodes} machines" if topology.nodes > 1 else ""
    sharding = "" if strategy.sharding == strategy.name else f" ({strategy.sharding})"
    layers = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    steps = f"T = {args.T}, " if hasattr(args, "T") else ""
    policy = getattr(args, "activation_checkpoint", "none")
    return {
        "batch": f"{steps}{args.batch_size} images a device, activation checkpointing: {policy}",
        "backend": f"{layers}: {backend}" if nodes else "no spiking neurons",
        "loader": f"{loader}{many}, {len(data.classes)} classes",
        "strategy": f"{strategy.name}{sharding}",
        "devices": f"{strategy.world_size} × {name}{where}",
        **describe_fine_tuning(args, net),
        **numerics_of(args, device, strategy.amp_dtype),
    }
