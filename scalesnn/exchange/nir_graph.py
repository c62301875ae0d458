"""A net as a NIR graph: one time-step is run, and what its layers do to the image is written down.

NIR adds up what arrives at a node, so a sum in the net (a shortcut) is no node: its sources are all linked to
whatever takes it. What NIR has no node for is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nir
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.hooks import RemovableHandle

from scalesnn import functional
from scalesnn.exchange.nir_nodes import DT, AffineMap, average_pool, neuron_node, refuse, spike_max_pool
from scalesnn.neuron import BaseNode

__all__ = ["nir_graph", "write_nir"]

AFFINE = (nn.Conv1d, nn.Conv2d, nn.Linear)
LEAVES = (*AFFINE, BatchNorm, BaseNode, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten)
SUMS: set[Any] = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
FLATTENS: set[Any] = {torch.flatten, Tensor.flatten}
SAME: set[Any] = {Tensor.contiguous, Tensor.clone, Tensor.detach, torch.clone, torch.detach}


@dataclass
class Signal:
    """A tensor of the net, as the graph knows it.

    Attributes:
        sources: the nodes whose outputs it is the sum of.
        spikes: it is 0 or 1 everywhere.
        taken: a node takes it, so the map that made it stays as it is.
        folded: it is the output of a map that goes on with a BatchNorm since, so nothing else may take it.
    """

    sources: tuple[str, ...]
    spikes: bool = False
    taken: bool = False
    folded: bool = False


class _Recorder(TorchFunctionMode):
    """Watches one forward pass; ``nodes`` and ``edges`` grow with it."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.nodes: dict[str, nir.NIRNode | AffineMap] = {"input": nir.Input(shape_of(x))}
        self.edges: list[tuple[str, str]] = []
        self.signals = {id(x): Signal(("input",))}
        self.alive = [x]  # an id belongs to a tensor as long as it lives
        self.path = [""]
        self.inside: str | None = None  # the leaf that runs
        self.names = {module: name for name, module in net.named_modules()}

    def hooks(self) -> list[RemovableHandle]:
        """Have every module of the net report."""
        handles: list[RemovableHandle] = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        return handles

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and id(a) in self.signals]
        result = func(*args, **kwargs)
        if self.inside is None and known and isinstance(result, Tensor):
            self._keep(result, self._of_function(func, args, kwargs, result))
        return result

    def output(self, y: Any) -> None:
        """End the graph with the net's output."""
        if not isinstance(y, Tensor) or id(y) not in self.signals:
            raise refuse("the net", "its output is not made by its layers")
        self.nodes["output"] = nir.Output(shape_of(y))
        self._link("the net", self.signals[id(y)], "output")

    # ---- one thing that the net does ----

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.path.append(self.names[module])
        if self.inside is None and isinstance(module, LEAVES):
            self.inside = self.names[module]

    def _leave(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        name = self.path.pop()
        if self.inside != name:
            return
        self.inside = None
        x = inputs[0]
        if id(x) not in self.signals:
            raise refuse(name, "its input is not made by the net's layers")
        self._keep(output, self._of_layer(name, module, x, output, kwargs))

    def _keep(self, tensor: Tensor, signal: Signal) -> None:
        self.signals[id(tensor)] = signal
        self.alive.append(tensor)

    def _of_layer(self, name: str, module: nn.Module, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Signal:
        signal, shape = self.signals[id(x)], shape_of(x)
        if isinstance(module, BatchNorm):
            return self._of_norm(name, module, x, y, kwargs)
        if isinstance(module, AFFINE):
            return self._node(name, AffineMap(name, module, shape), signal)
        if isinstance(module, BaseNode):
            return self._neuron(module, signal, shape)
        if isinstance(module, nn.Flatten):
            if module.start_dim not in (1, 1 - x.dim()) or module.end_dim not in (-1, x.dim() - 1):
                raise refuse(name, f"start_dim {module.start_dim}, end_dim {module.end_dim}")
            return self._flatten(name, signal, x)
        if isinstance(module, nn.MaxPool2d):
            if not signal.spikes:
                raise refuse(name, "max pooling of what is not spikes: NIR has average and sum pooling")
            mean, fire = spike_max_pool(name, module, shape_of(y))
            return self._node(f"{name}_fires", fire, self._node(name, mean, signal), spikes=True)
        return self._node(name, average_pool(name, module, shape, shape_of(y)), signal)

    def _of_norm(self, name: str, norm: Any, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Signal:
        """BatchNorm, then + residual, then neuron, as ``layer.BatchNorm2d`` is called."""
        signal = self.signals[id(x)]
        made = self.nodes.get(signal.sources[0])
        if norm.running_mean is None or norm.running_var is None:
            raise refuse(name, "BatchNorm without running statistics")
        if len(signal.sources) != 1 or not isinstance(made, AffineMap) or signal.taken or signal.folded:
            raise refuse(name, "a BatchNorm that cannot be folded: no convolution of its own before it")
        made.fold(norm)
        signal.folded = True
        result = Signal(signal.sources)
        residual, neuron = kwargs.get("residual"), kwargs.get("neuron")
        if residual is not None:
            if id(residual) not in self.signals or residual.shape != x.shape:
                raise refuse(name, "its residual is of another shape, or not made by the net's layers")
            result = self._sum(name, result, self.signals[id(residual)])
        return result if neuron is None else self._neuron(neuron, result, shape_of(y))

    def _of_function(self, func: Any, args: Any, kwargs: dict[str, Any], result: Tensor) -> Signal:
        where = f"{self.path[-1] or 'the net'}"
        first = self.signals.get(id(args[0])) if args else None
        if func in SAME and first is not None:
            return first
        if func in SUMS and len(args) == 2 and kwargs.get("alpha", 1) == 1:
            other = self.signals.get(id(args[1]))
            if first is not None and other is not None and args[0].shape == args[1].shape:
                return self._sum(where, first, other)
        if func in FLATTENS and first is not None and result.shape[1:].numel() == result.shape[-1]:
            return self._flatten(f"{where}.flatten" if self.path[-1] else "flatten", first, args[0])
        raise refuse(where, f"{resolve_name(func) or func}: NIR has no node for it")

    # ---- what it becomes ----

    def _neuron(self, neuron: nn.Module, signal: Signal, shape: tuple[int, ...]) -> Signal:
        name = self.names.get(neuron, type(neuron).__name__)
        if not isinstance(neuron, BaseNode):
            raise refuse(name, f"{type(neuron).__name__}: NIR has IF and LIF neurons")
        return self._node(name, neuron_node(name, neuron, shape), signal, spikes=True)

    def _flatten(self, name: str, signal: Signal, x: Tensor) -> Signal:
        # counted from the end: readers differ in whether the batch counts
        node = nir.Flatten(input_type={"input": torch.tensor(shape_of(x)).numpy()}, start_dim=1 - x.dim())
        return self._node(name, node, signal, spikes=signal.spikes)

    def _sum(self, where: str, one: Signal, other: Signal) -> Signal:
        for part in (one, other):
            self._check(where, part)
            part.taken = True
        both = (*one.sources, *other.sources)
        if len(set(both)) < len(both):
            raise refuse(where, "a value that is added twice: NIR has one edge between two nodes")
        return Signal(both)

    def _node(
        self, name: str, node: nir.NIRNode | AffineMap, signal: Signal, *, spikes: bool = False
    ) -> Signal:
        name = {"": "net", "input": "input_layer", "output": "output_layer"}.get(name, name)
        if name in self.nodes:
            raise refuse(name, "it is called twice in a time-step")
        self.nodes[name] = node
        self._link(name, signal, name)
        return Signal((name,), spikes)

    def _link(self, where: str, signal: Signal, name: str) -> None:
        self._check(where, signal)
        signal.taken = True
        self.edges += [(source, name) for source in signal.sources]

    def _check(self, where: str, signal: Signal) -> None:
        if signal.folded:
            raise refuse(where, "it takes a convolution's output before its BatchNorm, which is folded")


def shape_of(x: Tensor) -> Any:
    """The shape of one image's values."""
    return tuple(x.shape[1:])


def nir_graph(net: nn.Module, image_shape: tuple[int, ...]) -> nir.NIRGraph:
    """The net in evaluation mode as a NIR graph; its output is that of one time-step.

    Args:
        net: of scalesnn's and torch's layers; it is left as it is.
        image_shape: of one time-step's input: C, H, W.

    Raises:
        UserError: names what NIR cannot say.
    """
    net = copy.deepcopy(net).cpu().float().eval()
    functional.set_step_mode(net, "s")
    x = torch.zeros(1, *image_shape)
    recorder = _Recorder(net, x)
    handles = recorder.hooks()
    try:
        with torch.no_grad(), recorder:
            y = net(x)
    finally:
        for handle in handles:
            handle.remove()
    recorder.output(y)
    nodes = {n: node.node() if isinstance(node, AffineMap) else node for n, node in recorder.nodes.items()}
    return nir.NIRGraph(nodes, recorder.edges, metadata={"dt": DT})


def write_nir(net: nn.Module, image_shape: tuple[int, ...], file: Path) -> int:
    """Write ``nir_graph`` to a file; returns the number of nodes."""
    graph = nir_graph(net, image_shape)
    nir.write(file, graph)
    return len(graph.nodes)
