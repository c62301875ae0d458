"""Outputs of convolutions under a policy: an ordinary tensor to everybody, also to code that is not ours."""

import copy

import memory_nets as nets
import pytest
import torch
from torch import nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.kernels.deferred import Deferred
from scalesnn.memory import Policy, apply_policy, policy_of

POLICIES = ["layer", "time:2"]


class Squared(torch.autograd.Function):
    """A user's own Function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def conv_bn(channels, bias=True):
    return layer.Conv2d(channels, 8, 3, padding=1, bias=bias), layer.BatchNorm2d(8)


class VGG(nn.Module):
    """Convolutions with biases, soft reset, pools, dropout; layers one by one."""

    def __init__(self):
        super().__init__()
        layers = []
        for channels in (3, 8, 8):
            layers += [*conv_bn(channels), neuron.ParametricLIFNode(v_reset=None), layer.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, layer.Dropout(0.3))
        self.head = layer.Linear(8, 7)

    def forward(self, x):
        return self.head(self.features(x).mean((-2, -1)))


class Touched(nn.Module):
    """Code that touches outputs of convolutions and normalisations in every way."""

    def __init__(self):
        super().__init__()
        self.a, self.bn_a = conv_bn(3, bias=False)
        self.b, self.bn_b = conv_bn(8)
        self.c, self.bn_c = conv_bn(8)
        self.d, self.bn_d = conv_bn(8)
        self.sn = nn.ModuleList([neuron.LIFNode(surrogate_function=surrogate.ATan()) for _ in range(4)])
        self.last = layer.Conv2d(8, 7, 1)

    def forward(self, x):
        y = self.a(x)
        rate = y.detach().mean()  # looked at, and then normalised
        x = self.sn[0](self.bn_a(y)) * (1 + 0 * rate)
        y = Squared.apply(self.b(x))
        y = self.bn_b(y + 0.1 * self.c(x).mul_(2))
        y += self.bn_c(self.c(x))
        identity = self.bn_d(self.d(x))
        identity += y
        x = self.sn[1](identity)
        x = self.sn[2](x + self.bn_c(self.c(x)))  # bn_c on the right
        x = self.sn[3](self.d(x))  # no normalisation
        return self.last(x).flatten(-2).mean(-1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("net", [VGG, Touched])
def test_nets_of_users_are_exact(net, policy, monkeypatch, compare):
    monkeypatch.setitem(nets.NETS, "of a user", net)
    compare(nets.make("of a user"), policy, nets.images())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_net_that_ends_with_a_convolution_returns_a_plain_tensor(policy):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(3, 7, 3), neuron.IFNode(), layer.Conv2d(7, 7, 1))
    functional.set_step_mode(net, "m")
    out = apply_policy(net, policy)(torch.randn(5, 2, 3, 8, 8))
    assert type(out) is torch.Tensor


def test_only_what_a_unit_takes_is_deferred():
    torch.manual_seed(0)
    conv, norm = conv_bn(3)
    net = nn.Sequential(conv, norm)
    functional.set_step_mode(net, "m")
    apply_policy(net, "time:2")
    x = torch.randn(5, 2, 3, 8, 8)
    y = conv(x)
    assert isinstance(y, Deferred)
    assert isinstance(norm(y), Deferred)
    assert type(y + 1) is torch.Tensor
    assert type(norm(y)) is not Deferred, "y has values now"
    with torch.no_grad():
        assert type(conv(x)) is torch.Tensor
    conv.register_forward_hook(lambda module, x, y: None)
    assert type(conv(x)) is torch.Tensor, "somebody looks at it"


def test_hooks_on_the_gradient_of_an_output_are_called():
    found = []
    for policy in ("none", "time:2"):
        torch.manual_seed(0)
        conv, norm = conv_bn(3)
        sn, seen = neuron.IFNode(surrogate_function=surrogate.ATan()), []
        net = nn.Sequential(conv, norm, sn).double()
        functional.set_step_mode(net, "m")
        apply_policy(net, policy)
        for normalised in (False, True):
            y = conv(nets.images())
            y = norm(y) if normalised else y
            y.register_hook(lambda g, seen=seen: seen.append(g.clone()))
            sn(y if normalised else norm(y)).square().mean().backward()
            sn.reset()
        found.append({str(i): g for i, g in enumerate(seen)} | {"w": conv.weight.grad})
    assert len(found[0]) == 3  # two hooks, and the weight
    nets.assert_same(found[1], found[0], 1e-10)


def test_a_weight_changed_before_backward_is_an_error():
    model = apply_policy(nets.make("own"), "layer")
    out = model(nets.images())
    with torch.no_grad():
        model.body[0].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_input_changed_before_its_output_is_used_is_an_error():
    conv, norm = conv_bn(3)
    net = nn.Sequential(conv, norm)
    functional.set_step_mode(net, "m")
    apply_policy(net, "layer")
    x = torch.randn(5, 2, 3, 8, 8)
    y = conv(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        norm(y)


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_parameters_get_no_gradient(policy):
    found = []
    for name in ("none", policy):
        model = apply_policy(nets.make("spiking_resnet18"), name)
        for frozen in ("conv1.weight", "bn1.weight", "layer1.0.bn2.bias", "layer1.1.conv1.weight"):
            model.get_parameter(frozen).requires_grad_(False)
        found.append(nets.step(model, nets.images()))
    nets.assert_same(found[1], found[0], 1e-10)


@pytest.mark.parametrize("policy", POLICIES)
def test_potentials_are_carried_over_calls_and_have_gradients(policy):
    found = []
    for name in ("none", policy):
        model = apply_policy(nets.make("spiking_resnet18"), name)
        out = model(nets.images()).square().mean() + model(nets.images()).square().mean()
        (out + model.layer1[0].sn2.v.square().mean()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    nets.assert_same(found[1], found[0], 1e-10)


def test_detach_cuts_gradients_at_the_borders_of_chunks():
    model, x = nets.make("own").eval(), nets.images()  # without statistics over all steps
    chunked = copy.deepcopy(model)

    def truncated(x):
        outputs = []
        for part in x.split(2):
            outputs.append(chunked(part))
            functional.detach_net(chunked)
        return torch.cat(outputs)

    expected = nets.step(truncated, x, chunked)
    apply_policy(model, "time:2,detach")
    nets.assert_same(nets.step(model, x), expected, 1e-10)  # chunk after chunk
    model = nets.make("own").eval()
    apply_policy(model, "time:2,detach")
    model.zero_grad()
    found = nets.step(model.forward.args[1], x, model)  # layer after layer, in chunks
    nets.assert_same(found, expected, 1e-10)


def test_no_class_changes_and_copies_keep_the_policy():
    model = nets.make("spiking_resnet18")
    classes = [type(m) for m in model.modules()]
    for policy in ("block", "layer", "time:2,detach"):
        apply_policy(model, policy)
        assert [type(m) for m in model.modules()] == classes
        twin = copy.deepcopy(model)
        assert policy_of(twin) == policy_of(model) == Policy.parse(policy)
        expected, found = (nets.step(m, nets.images()) for m in (model, twin))
        model.zero_grad()
        nets.assert_same(found, expected, 0.0)
        with torch.no_grad():
            twin.conv1.weight.zero_()
        assert model.conv1.weight.abs().sum() > 0
    apply_policy(model, "none")
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert policy_of(model) == Policy()


def test_chunks_have_one_name():
    assert Policy.parse("layer+time:4") == Policy.parse("time:4")
    assert str(Policy.parse("layer+time:4,detach")) == "time:4,detach"


class Alias(torch.autograd.Function):
    """What ZeRO-3's hooks put around inputs and outputs of modules."""

    @staticmethod
    def forward(x):
        return x.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_spikes_are_kept_as_bits_where_hooks_hand_on_aliases():
    def alias(value):
        if isinstance(value, tuple):
            return tuple(map(alias, value))
        return Alias.apply(value) if isinstance(value, torch.Tensor) and value.requires_grad else value

    def before(module, inputs):
        return alias(inputs)

    def after(module, inputs, output):
        return alias(output)

    before.__module__ = after.__module__ = "deepspeed.hooks"  # a stranger's would watch the layers
    model = apply_policy(nets.make("spiking_resnet18"), "layer")
    for module in model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    assert nets.forms(model(nets.images(static=True))) == [True] * 19
