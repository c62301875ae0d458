"""NIR files, read back by SpikingJelly, by snnTorch and by NIR's own equations: the same spikes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trained_nets import lively

from scalesnn import functional, layer, neuron
from scalesnn.base import UserError
from scalesnn.model import ms_resnet, resnet, sew_resnet, spiking_resnet

nir = pytest.importorskip("nir")

from scalesnn.exchange.nir_graph import nir_graph, write_nir  # noqa: E402

T, IMAGE = 6, (3, 32, 32)


class Euler(nn.Module):
    """NIR's IF or LIF as its definition says, by Euler steps of 0.1 ms: fires above the threshold."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.node, self.leaky = node, isinstance(node, nir.LIF)
        self.v = torch.from_numpy(node.v_reset)

    def forward(self, x: Tensor) -> Tensor:
        node, dt = self.node, 1e-4
        r, threshold, reset = map(torch.from_numpy, (node.r, node.v_threshold, node.v_reset))
        if self.leaky:
            tau, leak = torch.from_numpy(node.tau), torch.from_numpy(node.v_leak)
            v = self.v + (dt / tau) * (leak - self.v + r * x)
        else:
            v = self.v + dt * r * x
        spikes = (v > threshold).to(x)
        self.v = torch.where(spikes > 0, reset, v)
        return spikes


def by_definition(graph: Any) -> Any:
    """A reader on nirtorch's graph executor and ``Euler``."""
    import nirtorch

    def conv(node: Any) -> nn.Module:
        made = nn.Conv2d(*node.weight.shape[1::-1], node.weight.shape[2:], node.stride, node.padding)
        made.groups = int(node.groups)
        made.weight, made.bias = (nn.Parameter(torch.from_numpy(a)) for a in (node.weight, node.bias))
        return made

    def affine(node: Any) -> nn.Module:
        made = nn.Linear(*node.weight.shape[::-1])
        made.weight, made.bias = (nn.Parameter(torch.from_numpy(a)) for a in (node.weight, node.bias))
        return made

    maps = {nir.IF: Euler, nir.LIF: Euler, nir.Conv2d: conv, nir.Affine: affine}
    return nirtorch.nir_to_torch(graph, maps)


def by_spikingjelly(graph: Any) -> Any:
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    return exchange.import_from_nir(graph, step_mode="s")


def by_snntorch(graph: Any) -> Any:
    return pytest.importorskip("snntorch.import_nir").import_from_nir(graph)


@torch.no_grad()
def read_spikes(module: Any, x_TNC: Tensor, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a reader's net step by step: its outputs, and the spikes of the neurons ``names``."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:

        def look(_m: Any, _x: Any, y: Any, name: str = name) -> None:
            seen[name].append(y[0] if isinstance(y, tuple) else y)

        module.get_submodule(name.replace(".", "_")).register_forward_hook(look)
    module.eval()
    outputs, state = [], None
    for x in x_TNC:
        y, state = module(x) if state is None else module(x, state)
        outputs.append(y)
    return torch.stack(outputs), {name: torch.stack(steps) for name, steps in seen.items()}


@torch.no_grad()
def own_spikes(net: nn.Module, x_TNC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of our net, in plain torch; in every layer some neurons fire, and some do not."""
    functional.set_step_mode(net, "m")
    functional.set_backend(net, "torch")
    functional.reset_net(net)
    seen: dict[str, Tensor] = {}
    handles = []
    for name, node in net.named_modules():
        if isinstance(node, neuron.BaseNode):
            handles.append(node.register_forward_hook(lambda _m, _x, y, name=name: seen.update({name: y})))
    y = net(x_TNC)
    for handle in handles:
        handle.remove()
    assert all(0 < spikes.mean() < 1 for spikes in seen.values())
    return y, seen


lif = {"spiking_neuron": neuron.LIFNode, "tau": 3.0, "decay_input": False}
plif = {"spiking_neuron": neuron.ParametricLIFNode, "init_tau": 1.7}
NETS: dict[str, Any] = {
    "spiking": partial(spiking_resnet.SpikingResNet, resnet.BasicBlock, (1, 1, 1, 1), 5, **lif),
    "sew": partial(sew_resnet.SEWResNet, sew_resnet.BasicBlock, (2, 1, 1, 1), 5, **plif),
    "ms": partial(ms_resnet.MSResNet, (1, 1, 1, 1), 5),
    "ms deep stem": partial(ms_resnet.MSResNet, (1, 1, 1, 1), 5, deep_stem=True, dropout=0.2),
    "bottleneck": partial(
        sew_resnet.SEWResNet, sew_resnet.Bottleneck, (1, 1, 1, 1), 5, spiking_neuron=neuron.IFNode
    ),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.long) if k in ("spiking", "ms deep stem") else k for k in NETS],
)
def test_residual_nets_spike_alike_in_two_readers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = lively(NETS[kind]())
    x = 2 * torch.rand(T, 1, *IMAGE)
    expected, spikes = own_spikes(net, x)
    write_nir(net, IMAGE, tmp_path / "net.nir")
    readers = [by_spikingjelly]
    if kind != "bottleneck":  # snnTorch 1.0 reads an IF neuron as a leaky one with beta = 0.9
        readers.append(by_snntorch)
    for read in readers:
        outputs, found = read_spikes(read(nir.read(tmp_path / "net.nir")), x, list(spikes))
        assert {name: int((found[name] != s).sum()) for name, s in spikes.items()} == dict.fromkeys(spikes, 0)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


class Vector(nn.Sequential):
    """Linear → neuron."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__(layer.Linear(7, 20), node)


@pytest.mark.parametrize("v_reset", [0.0, -0.3, 0.25])
@pytest.mark.parametrize("kind", ["IF", "LIF", "LIF, input not decayed", "PLIF", "PLIF, input not decayed"])
@pytest.mark.parametrize("read", [by_spikingjelly, by_definition])
def test_every_neuron_and_hard_reset_spikes_alike(read: Any, kind: str, v_reset: float) -> None:
    torch.manual_seed(3)
    settings: dict[str, Any] = {"v_threshold": 0.7, "v_reset": v_reset}
    if kind == "IF":
        node: neuron.BaseNode = neuron.IFNode(**settings)
    else:
        make, tau = (
            (neuron.LIFNode, "tau") if kind.startswith("LIF") else (neuron.ParametricLIFNode, "init_tau")
        )
        node = make(**{tau: 2.3, "decay_input": kind in ("LIF", "PLIF")}, **settings)
    net = Vector(node)
    x = 3 * torch.randn(12, 4, 7) + 0.5
    expected, spikes = own_spikes(net, x)
    outputs, _ = read_spikes(read(nir_graph(net, (7,))), x, [])
    assert torch.equal(outputs, expected)
    assert torch.equal(spikes["1"], expected)


def test_a_charge_that_just_reaches_the_threshold_fires_where_readers_ask_for_more() -> None:
    net = Vector(neuron.IFNode(v_threshold=0.75))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(20, 7)), net[0].bias.zero_()
    x = torch.full((2, 1, 7), 0.375)
    outputs, _ = read_spikes(by_definition(nir_graph(net, (7,))), x, [])
    assert outputs.sum(-1).flatten().tolist() == [0, 7]


def test_batch_norm_is_folded_exactly() -> None:
    torch.manual_seed(0)
    net = lively(nn.Sequential(layer.Conv2d(2, 5, 3, padding=1, bias=True), layer.BatchNorm2d(5)))
    graph = nir_graph(net, (2, 6, 6))
    assert sorted(graph.nodes) == ["0", "input", "output"]
    node, x = graph.nodes["0"], torch.randn(4, 2, 6, 6, dtype=torch.float64)
    found = nn.functional.conv2d(
        x, *(torch.from_numpy(a).double() for a in (node.weight, node.bias)), padding=1
    )
    torch.testing.assert_close(found, net.double()(x), rtol=1e-6, atol=1e-6)


class Named(nn.Module):
    """Layers with the names that NIR's own nodes have."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.sn, self.output = layer.Linear(7, 9), neuron.LIFNode(), layer.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.sn(self.input(x)))


def test_layers_called_input_and_output_do_not_disturb_the_graph() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(T, 2, 7)
    for net in (Named(), layer.Linear(7, 4)):
        expected, _ = own_spikes(net, x)
        outputs, _ = read_spikes(by_spikingjelly(nir_graph(net, (7,))), x, [])
        torch.testing.assert_close(outputs, expected)


def test_max_pooling_of_spikes_is_said_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(1, 4, 3), neuron.LIFNode(), layer.MaxPool2d(3, 2, 1))
    x = 4 * torch.randn(T, 2, 1, 9, 9)
    expected, _ = own_spikes(net, x)
    assert 0.1 < expected.mean() < 0.95
    for read in (by_spikingjelly, by_snntorch):
        assert torch.equal(read_spikes(read(nir_graph(net, (1, 9, 9))), x, [])[0], expected)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sn = neuron.IFNode()

    def forward(self, x: Tensor) -> Tensor:
        return self.sn(self.sn(x))


class Own(neuron.IFNode):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + 2 * x


class BeforeAndAfter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = layer.Conv2d(3, 3, 1), layer.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def sew(cnf: str) -> nn.Module:
    return sew_resnet.SEWResNet(sew_resnet.BasicBlock, (1, 1, 1, 1), 5, cnf=cnf)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Sequential(neuron.IFNode(v_reset=None)), "0: soft reset"),
        (lambda: nn.Sequential(Own()), "0: Own: NIR has IF and LIF"),
        (lambda: nn.Sequential(layer.Conv2d(3, 4, 1), layer.GroupNorm(2, 4)), "1: .*group_norm"),
        (lambda: nn.Sequential(layer.BatchNorm2d(3)), "0: a BatchNorm that cannot be folded"),
        (lambda: nn.Sequential(layer.MaxPool2d(2)), "0: max pooling of what is not spikes"),
        (lambda: nn.Sequential(neuron.IFNode(), layer.MaxPool2d(2, ceil_mode=True)), "1: .*ceil_mode"),
        (lambda: nn.Sequential(layer.AvgPool2d(3, ceil_mode=True)), "0: ceil_mode"),
        (lambda: nn.Sequential(layer.AdaptiveAvgPool2d(5)), "0: adaptive pooling"),
        (lambda: nn.Sequential(layer.Conv2d(3, 3, 3, padding=1, padding_mode="circular")), "0: padding_mode"),
        (lambda: nn.Sequential(nn.ReLU()), "0: .*relu"),
        (lambda: nn.Sequential(layer.ConvTranspose2d(3, 3, 2)), "0: .*conv_transpose2d"),
        (Twice, "sn: it is called twice"),
        (BeforeAndAfter, "before its BatchNorm"),
        (Doubled, "added twice"),
        (lambda: sew("AND"), "layer1.0: .*mul"),
        (lambda: sew("IAND"), "layer1.0: .*sub"),
    ],
)
def test_what_nir_cannot_say_is_refused_by_name(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^--format nir: {said}|^--format nir: .*{said}"):
        nir_graph(make(), IMAGE)


def test_the_net_is_left_as_it_was() -> None:
    net = NETS["sew"]().train()
    functional.set_step_mode(net, "m")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    nir_graph(net, IMAGE)
    assert net.training
    functional.check_step_mode(net, "m")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
