"""Nets and one training step, to compare activation-checkpoint policies with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet

T, N, SIZE = 5, 2, 16


class OwnBlock(nn.Module):
    """A user's block: layers called one by one, dropout, a learned time constant, no unit call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = layer.Conv2d(channels, channels, 3, padding=1)
        self.bn = layer.BatchNorm2d(channels)
        self.sn = neuron.ParametricLIFNode(init_tau=1.5, surrogate_function=surrogate.ATan())
        self.drop = layer.Dropout(0.2)
        self.conv2 = layer.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = layer.BatchNorm2d(channels)
        self.sn2 = neuron.LIFNode(v_reset=None, surrogate_function=surrogate.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.sn(self.bn(self.conv(x))))
        return self.sn2(self.bn2(self.conv2(y)) + x)


class OwnNet(nn.Module):
    """A user's net of such blocks, with an average pool and random noise between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            layer.Conv2d(3, 12, 3, padding=1), layer.BatchNorm2d(12), neuron.IFNode(), layer.AvgPool2d(2)
        )
        self.body = nn.ModuleList([OwnBlock(12), OwnBlock(12)])
        self.head = layer.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        return self.head(x.mean((-2, -1)))


def chain() -> nn.Module:
    """A plain chain without blocks."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 8), (8, 12), (12, 12)):
        layers += [layer.Conv2d(c_in, c_out, 3, padding=1, bias=False), layer.BatchNorm2d(c_out)]
        layers += [neuron.LIFNode(tau=1.7, surrogate_function=surrogate.ATan()), layer.MaxPool2d(2)]
    return nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(12, 7))


ATAN: dict[str, Any] = {"num_classes": 7, "surrogate_function": surrogate.ATan()}
NETS: dict[str, Callable[[], nn.Module]] = {
    "spiking_resnet18": lambda: spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.IFNode, detach_reset=True, **ATAN
    ),
    "spiking_resnet50_plif": lambda: spiking_resnet.spiking_resnet50(
        spiking_neuron=neuron.ParametricLIFNode, width_per_group=8, **ATAN
    ),
    "sew_resnet18": lambda: sew_resnet.sew_resnet18(spiking_neuron=neuron.LIFNode, cnf="ADD", **ATAN),
    "ms_resnet18": lambda: ms_resnet.ms_resnet18(num_classes=7, dropout=0.3),
    "own": OwnNet,
    "chain": chain,
}


def make(net: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The net, in multi-step mode, with weights that make its neurons fire."""
    torch.manual_seed(1)
    model = NETS[net]().to(dtype)
    functional.set_step_mode(model, "m")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.0, 0.5)
    return model


def images(dtype: torch.dtype = torch.float64, static: bool = False, steps: int = T) -> Tensor:
    """A batch [T, N, 3, SIZE, SIZE]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1 if static else steps, N, 3, SIZE, SIZE, generator=generator, dtype=dtype)
    return x.expand(steps, -1, -1, -1, -1)


def step(model: nn.Module, x: Tensor, module: nn.Module | None = None, **autocast: Any) -> dict[str, Tensor]:
    """One forward and backward pass: loss, gradients, buffers, potentials and the random state after it."""
    module = model if module is None else module
    torch.manual_seed(3)
    target = torch.arange(x.shape[1]) % 7
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast.get("bf16", False)):
        out = model(x)
        loss = nn.functional.cross_entropy(out.mean(0).to(x.dtype), target)
        loss = loss + (out[-1].to(x.dtype) ** 2).mean()
    memories = {
        f"memory.{name}.{key}": value.detach().clone()
        for name, m in module.named_modules()
        if hasattr(m, "named_memories")
        for key, value in m.named_memories()
        if isinstance(value, Tensor)
    }
    loss.backward()
    found = {"loss": loss.detach(), "random": torch.rand(2), **memories}
    found |= {f"grad.{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    found |= {f"buffer.{n}": b.clone() for n, b in module.named_buffers()}
    functional.reset_net(module)
    return found


def forms(out: Tensor) -> list[bool]:
    """Of every streamed unit behind ``out``, whether it keeps its convolution's input as bits."""
    seen, waiting, found = set(), [out.grad_fn], []
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "StreamedUnit" in node.name():
            found.append(node.unit[0].form is not None)
        waiting += [function for function, _ in node.next_functions]
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal names, and values equal relative to the largest of a tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.double().abs().max()), 1e-3) if value.numel() else 1.0
        error = float((found[name].double() - value.double()).abs().max()) / scale if value.numel() else 0.0
        assert error <= tolerance, f"{name} differs by {error:.2g} of its largest value"
