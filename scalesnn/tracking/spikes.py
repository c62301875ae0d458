"""The health of a spiking network, measured on one batch now and then.

    with monitor.watch(step):                  # does nothing unless the step is due
        output = model(images)
    strategy.backward(loss)
    monitor.take_gradients(step, strategy.gradient_norms)
    record.update(monitor.read())              # empty unless something was measured

What is measured, per spiking layer: the firing rate, over everything and per time-step; the share of
channels that never fire (dead) and that always fire (saturated); mean and standard deviation of the membrane
potential after the last step, and the share of neurons near enough to the threshold for the surrogate to
pass gradient. Per weight layer: the gradient's norm. Over all: synaptic operations and energy per image
(``tracking.energy``).

Reference: docs/monitoring.md; the tests compare every number with a slow computation from full spike tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn.neuron import BaseNode
from scalesnn.tracking.energy import SynapseCounter

__all__ = ["SpikeMonitor", "active_window"]

_WARN_SHARE = 0.5  # of a layer's channels
_WARN_SAMPLES = 3  # measurements in a row


@dataclass
class _Layer:
    """What one batch says about one spiking layer; tensors stay on the device until ``read``."""

    counts_TC: list[Tensor] = field(default_factory=list)  # spikes per time-step and channel
    neurons: int = 0  # neurons per channel and time-step: N * H * W
    membrane: Tensor | None = None  # sum, sum of squares, number in the window, number of known charges
    membrane_numel: int = 0


class SpikeMonitor:
    """Measure spikes, membranes, gradients and energy at the first step and every ``every`` steps.

    Args:
        model: the network itself, not a wrapper of it (layers are named by their path in it).
        every: measure at steps divisible by this; 0 never.
        looks: whether this rank looks at its own spikes. The others only take part in what needs all ranks.
    """

    def __init__(self, model: nn.Module, every: int = 100, *, looks: bool = True) -> None:
        self.every = every
        self._looks = looks
        self._nodes = {name: node for name, node in model.named_modules() if isinstance(node, BaseNode)}
        self._synapses = SynapseCounter(model)
        self._windows = {name: active_window(node) for name, node in self._nodes.items()}
        self._layers: dict[str, _Layer] = {}
        self._gradients: dict[str, Tensor] = {}
        self._step: int | None = None
        self._fresh = True  # nothing measured yet in this process
        self._silent: dict[str, list[tuple[int, Tensor]]] = {}
        self._stuck: dict[str, list[tuple[int, Tensor]]] = {}
        self._warned: dict[tuple[str, str], float] = {}
        self._warnings: list[str] = []

    @property
    def training_flops_per_image(self) -> float | None:
        """FLOPs of forward and backward on one image: 3 × 2 × multiply-accumulates of all conv and linear
        layers over all time-steps (recomputation does not count); None before the first measurement.
        """
        return 6.0 * self._synapses.macs_per_image if self._synapses.macs_per_image else None

    def due(self, step: int) -> bool:
        """Whether ``watch(step)`` measures."""
        return self.every > 0 and (self._fresh or step % self.every == 0)

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Measure the forward passes inside, if ``step`` is due. Recomputation in the backward pass is
        outside, so it is not counted twice.
        """
        if step == self._step or not self.due(step):  # one micro-batch of a step is enough
            yield
            return
        self._layers, self._gradients, self._step, self._fresh = {}, {}, step, False
        if not self._looks:
            yield
            return
        names = {id(node): name for name, node in self._nodes.items()}

        def observe(node: BaseNode, spikes: Tensor, v_last: Tensor | None) -> None:
            self._observe(names[id(node)], node, spikes, v_last)

        for node in self._nodes.values():
            node.observer = observe
        try:
            with self._synapses.count():
                yield
        except BaseException:  # out of memory, say: a pass that breaks off is no measurement
            self._layers, self._step, self._fresh = {}, None, True
            self._synapses.read()
            raise
        finally:
            for node in self._nodes.values():
                node.observer = None

    def take_gradients(self, step: int, norms: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take the norms of the weights' gradients, if ``step`` is measured: call it on all ranks after the
        last backward pass of the step.

        Args:
            norms: gives them by the parameter's name; collective (``Strategy.gradient_norms``).
        """
        if step == self._step:
            self._gradients = {name.removesuffix(".weight"): norm for name, norm in norms().items()}

    @torch.no_grad()
    def read(self) -> dict[str, Any]:
        """The metrics of the last measured step; empty if none was measured since the last call."""
        if not self._layers:
            self._step = None
            return {}
        record: dict[str, Any] = {}
        fired = possible = 0.0
        for name, layer in self._layers.items():
            counts_TC = torch.cat(layer.counts_TC).double().cpu()
            rate_T = counts_TC.mean(1) / layer.neurons
            dead_C = counts_TC.sum(0) == 0
            saturated_C = counts_TC.sum(0) == layer.neurons * len(counts_TC)
            record[f"spikes/{name}/firing_rate"] = rate_T.mean().item()
            record[f"spikes/{name}/firing_rate_t"] = rate_T.tolist()
            record[f"spikes/{name}/dead_share"] = dead_C.double().mean().item()
            record[f"spikes/{name}/saturated_share"] = saturated_C.double().mean().item()
            if layer.membrane is not None:
                record.update(_membrane_metrics(name, layer))
            fired += counts_TC.sum().item()
            possible += counts_TC.numel() * layer.neurons
            self._judge(name, dead_C, self._silent.setdefault(name, []), "silent")
            self._judge(name, saturated_C, self._stuck.setdefault(name, []), "firing at every step")
        record["spikes/firing_rate"] = fired / possible
        record["spikes/dead_share"] = _mean(record, "/dead_share")
        record["spikes/saturated_share"] = _mean(record, "/saturated_share")
        record.update(self._synapses.read())
        if self._gradients:
            norms = torch.stack([norm.double() for norm in self._gradients.values()]).cpu()
            record.update(
                (f"gradient_norm/{name}", norm)
                for name, norm in zip(self._gradients, norms.tolist(), strict=True)
            )
        self._layers, self._gradients, self._step = {}, {}, None
        return record

    def warnings(self) -> list[str]:
        """Trouble found since the last call, in plain words; each layer is named once, and again when it
        gets worse.
        """
        found, self._warnings = self._warnings, []
        return found

    @torch.no_grad()
    def _observe(self, name: str, node: BaseNode, spikes: Tensor, v_last: Tensor | None) -> None:
        """Add the spikes [T, N, C, …] of one call. Chunks of one sequence come one after the other, and add
        up.
        """
        layer = self._layers.setdefault(name, _Layer())
        channels = spikes.shape[2] if spikes.dim() > 2 else 1
        others = [dim for dim in range(1, spikes.dim()) if dim != 2]
        # float32 holds every count up to 2**24; the images of one step are fewer per time-step and channel
        layer.counts_TC.append(spikes.sum(others, dtype=torch.float32).reshape(len(spikes), channels))
        layer.neurons = spikes[0].numel() // channels
        window = self._windows[name]
        if v_last is None or window is None:
            return
        v = v_last.float()
        if node.v_reset is None:  # soft reset: the charge is known everywhere
            charge, known = v + node.v_threshold * spikes[-1], torch.ones_like(v)
        else:  # hard reset: it is lost where the neuron fired
            charge, known = v, 1.0 - spikes[-1].float()
        low, high = window
        near = (charge - node.v_threshold >= low) & (charge - node.v_threshold <= high)
        layer.membrane = torch.stack(
            [v.sum(), (v * v).sum(), (near * known).sum(), known.sum()]
        )  # the last chunk of a sequence stays
        layer.membrane_numel = v.numel()

    def _judge(self, name: str, bad_C: Tensor, past: list[tuple[int, Tensor]], what: str) -> None:
        """Warn if a large share of the channels was bad in each of the last measurements."""
        assert self._step is not None
        past.append((self._step, bad_C))
        del past[:-_WARN_SAMPLES]
        share = torch.stack([bad for _, bad in past]).all(0).double().mean().item()
        least = self._warned.get((name, what), _WARN_SHARE - 0.1) + 0.1
        if len(past) == _WARN_SAMPLES and share >= least:
            self._warned[name, what] = share
            steps = past[-1][0] - past[0][0]
            self._warnings.append(f"{name}: {100 * share:.0f} % of channels {what} for {steps} steps")


def active_window(node: BaseNode) -> tuple[float, float] | None:
    """Between which charges, less the threshold, the node's surrogate passes at least a tenth of its largest
    gradient.

    Returns None for a surrogate without a derivative. Looked for between -8 and 8.
    """

    def slope(x: Tensor) -> Tensor:
        return node.surrogate_function.derivative(x).abs()

    points = torch.linspace(-8.0, 8.0, 3201, dtype=torch.float64)
    try:
        least = 0.1 * slope(points).max()
    except NotImplementedError:
        return None
    active = points[slope(points) >= least]
    gap = points[1] - points[0]
    low = torch.linspace(active[0] - gap, active[0], 3201, dtype=torch.float64)
    high = torch.linspace(active[-1], active[-1] + gap, 3201, dtype=torch.float64)
    return low[slope(low) >= least][0].item(), high[slope(high) >= least][-1].item()


def _membrane_metrics(name: str, layer: _Layer) -> dict[str, float]:
    assert layer.membrane is not None
    total, squares, near, known = layer.membrane.double().tolist()
    mean = total / layer.membrane_numel
    variance = max(0.0, squares / layer.membrane_numel - mean * mean)
    metrics = {f"membrane/{name}/mean": mean, f"membrane/{name}/std": variance**0.5}
    if known:
        metrics[f"membrane/{name}/active_share"] = near / known
    return metrics


def _mean(record: dict[str, Any], suffix: str) -> float:
    values = [value for key, value in record.items() if key.endswith(suffix)]
    return sum(values) / len(values)
