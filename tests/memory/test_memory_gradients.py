"""Gradients of long sequences, exact whoever else looks at them."""

import memory_nets as nets
import pytest
import torch
from torch import nn

from scalesnn import layer, neuron
from scalesnn.memory import apply_policy

LONG = 7  # with K = 2 four chunks, the last of one step
POLICIES = ["layer", "time:2"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("net", list(nets.NETS))
def test_long_sequences_are_exact(net, policy, compare):
    compare(nets.make(net), policy, nets.images(steps=LONG))


@pytest.mark.parametrize("policy", POLICIES)
def test_long_sequences_of_one_image_are_exact(policy, compare):
    compare(nets.make("spiking_resnet18"), policy, nets.images(steps=LONG, static=True))


@pytest.mark.parametrize("net", ["spiking_resnet18", "own"])
def test_exact_where_potentials_of_every_step_are_kept(net, compare):
    model = nets.make(net)
    for module in model.modules():
        if isinstance(module, neuron.BaseNode):
            module.store_v_seq = True
    compare(model, "time:2", nets.images(steps=LONG))


class Watched(nn.Module):
    """A net that keeps the outputs of the inner ones."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []
        for block in net.modules():
            if hasattr(block, "conv2"):
                block.register_forward_hook(lambda _m, _x, y: self.seen.append(y))


def both(policy, run, net="spiking_resnet18"):
    """What ``run`` gives of a net without and with a policy."""
    found = []
    for name in ("none", policy):
        torch.manual_seed(0)
        watched = Watched(apply_policy(nets.make(net), name))
        found.append(run(watched, nets.images(steps=LONG)))
    return found


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("net", ["spiking_resnet18", "sew_resnet18", "ms_resnet18"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_that_hooks_keep_stay_right_after_the_step(net, policy):
    def run(watched, x):
        kept = {}
        out = watched.net(x)
        for i, y in enumerate(watched.seen):
            y.register_hook(lambda g, i=i: kept.__setitem__(i, g))
        out.square().mean().backward()
        with torch.no_grad():
            for p in watched.net.parameters():
                p.mul_(1.5)
        return {f"{i}": g.clone() for i, g in kept.items()} | gradients_of(watched.net)

    expected, found = both(policy, run, net)
    nets.assert_same(found, expected, 1e-10)


def halve_in_place(gradient):
    gradient.mul_(0.5)


@pytest.mark.parametrize("change", [lambda g: g * 0.5, halve_in_place, lambda g: None])
def test_hooks_that_change_gradients_do(change):
    def run(watched, x):
        out = watched.net(x)
        for y in watched.seen:
            y.register_hook(change)
            y.retain_grad()
        out.square().mean().backward()
        found = {f"{i}": y.grad.clone() for i, y in enumerate(watched.seen)}
        return found | gradients_of(watched.net)

    expected, found = both("time:2", run)
    nets.assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_losses_through_the_same_layers(policy):
    def run(watched, x):
        out = watched.net(x)
        middle = watched.seen[2]
        out.square().mean().backward(retain_graph=True)
        (of_middle,) = torch.autograd.grad(out.sum(), middle, retain_graph=True)
        (middle * middle + middle).sum().backward(retain_graph=True)
        out.sum().backward()
        return {"middle": of_middle.clone(), **gradients_of(watched.net)}

    expected, found = both(policy, run)
    nets.assert_same(found, expected, 1e-10)


class Shared(nn.Module):
    """Spikes that two residual sums, a convolution and the output itself use."""

    def __init__(self):
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i}", layer.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False))
            self.add_module(f"bn{i}", layer.BatchNorm2d(8))
            self.add_module(f"sn{i}", neuron.LIFNode(tau=1.6, v_reset=None))
        self.head = layer.Linear(8, 7)

    def forward(self, x):
        x = self.bn0(self.conv0(x), neuron=self.sn0)
        y = self.bn1(self.conv1(x), neuron=self.sn1, residual=x)
        z = self.bn2(self.conv2(y), neuron=self.sn2, residual=x)
        z = self.bn3(self.conv3(z), neuron=self.sn3, residual=y) + x * y + y
        return self.head(z.mean((-2, -1)))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_residual_of_several_consumers(policy, monkeypatch, compare):
    monkeypatch.setitem(nets.NETS, "shared", Shared)
    compare(nets.make("shared"), policy, nets.images(steps=LONG))


@pytest.mark.parametrize("policy", POLICIES)
def test_an_input_gets_a_dense_gradient(policy):
    found = []
    for name in ("none", policy):
        model, x = apply_policy(nets.make("chain"), name), nets.images(steps=LONG).clone().requires_grad_()
        model(x).square().mean().backward()
        assert type(x.grad) is torch.Tensor
        found.append({"x": x.grad})
    nets.assert_same(found[1], found[0], 1e-10)
