"""The front of a net under ``layer+time:K`` with many chunks: exact, and of it no gradient stands whole."""

from unittest import mock

import memory_nets as nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesnn import functional, layer, neuron
from scalesnn.base import Piece
from scalesnn.memory import Policy, apply_policy, counting, front, streaming, sweeps
from scalesnn.memory.trace import trace

LONG = 11  # with K = 2 six chunks, the last of one step
PIECES = {"spiking_resnet18": 4, "spiking_resnet50_plif": 5}  # stem, first stage, first block of the second


@pytest.fixture
def fronts(monkeypatch):
    """The fronts that run: how many pieces they are of."""
    found = []

    def run(net, options, x):
        y, rest = front.run_front(net, options, x)
        found.append(len(net.pieces()) - len(rest))
        return y, rest

    monkeypatch.setattr(streaming, "run_front", run)
    return found


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("net", list(PIECES))
def test_exact_in_float64(net, static, compare, fronts):
    compare(nets.make(net), "layer+time:2", nets.images(steps=LONG, static=static))
    assert fronts == [PIECES[net]]


def test_exact_in_float32(compare, fronts):
    x = nets.images(torch.float32, steps=LONG, static=True)
    compare(nets.make("spiking_resnet18", torch.float32), "layer+time:2", x, 1e-5)
    assert fronts


def test_bfloat16_autocast(fronts):
    # not 16 pixels: oneDNN's bfloat16 gradient of a strided convolution of one pixel is partly random
    x = torch.randn(LONG, 2, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def run(policy):
        return nets.step(apply_policy(nets.make("spiking_resnet18", torch.float32), policy), x, bf16=True)

    found, expected = run("layer+time:2"), run("layer+time:2,whole")  # both round chunk by chunk
    assert fronts == [4]
    for name in ("loss", "memory.sn1.v", "grad.fc.weight"):
        nets.assert_same({name: found[name]}, {name: expected[name]}, 1e-5)
    # below, gradients pass bfloat16 in another order of additions
    a, b = (torch.cat([v.flatten() for n, v in f.items() if n.startswith("grad")]) for f in (found, expected))
    assert (a - b).double().norm() < 0.02 * b.double().norm()


@settings(max_examples=5, deadline=None)
@given(
    steps=st.integers(5, 12),
    size=st.sampled_from([9, 14, 16]),
    batch=st.integers(1, 6),
    channels_last=st.booleans(),
)
def test_exact_whatever_the_shape(steps, size, batch, channels_last):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(steps, batch, 3, size, size, generator=generator, dtype=torch.float64)
    found = []
    for policy in ("none", "layer+time:1"):
        model = apply_policy(nets.make("spiking_resnet18"), policy)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        found.append(nets.step(model, x))
    nets.assert_same(found[1], found[0], 1e-9)  # sums of few values over small variances


def two_calls(model, x, detach):
    """Gradients of a loss over two calls without reset between, and of the potentials."""
    first = model(x)
    if detach:
        functional.detach_net(model)
    second = model(x)
    loss = first.square().mean() + second.square().mean()
    for name, module in model.named_modules():
        if isinstance(module, neuron.BaseNode) and name in ("sn1", "layer1.0.sn2", "layer2.0.sn1"):
            loss = loss + module.v.square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("detach", [False, True])
def test_potentials_are_carried_and_have_gradients(detach, fronts):
    found = [
        two_calls(apply_policy(nets.make("spiking_resnet18"), policy), nets.images(steps=LONG), detach)
        for policy in ("none", "layer+time:2")
    ]
    nets.assert_same(found[1], found[0], 1e-10)
    assert len(fronts) == (2 if detach else 1)  # potentials that go back further are for autograd


def test_truncated_backpropagation_is_that_of_whole_gradients():
    found = [
        nets.step(apply_policy(nets.make("spiking_resnet18"), policy), nets.images(steps=LONG))
        for policy in ("layer+time:2,detach,whole", "layer+time:2,detach", "layer+time:2")
    ]
    nets.assert_same(found[1], found[0], 1e-10)
    assert (found[2]["grad.conv1.weight"] - found[1]["grad.conv1.weight"]).abs().max() > 1e-6


def test_gradients_may_be_asked_for_twice():
    found = []
    for policy in ("none", "layer+time:2"):
        model = apply_policy(nets.make("spiking_resnet18"), policy)
        out = model(nets.images(steps=LONG))
        out.square().mean().backward(retain_graph=True)
        out.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    nets.assert_same(found[1], found[0], 1e-10)


def test_weights_changed_before_backward_are_an_error():
    model = apply_policy(nets.make("spiking_resnet18"), "layer+time:2")
    out = model(nets.images(steps=LONG))
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_frozen_parameters_get_no_gradient(fronts):
    found = []
    for policy in ("none", "layer+time:2"):
        model = apply_policy(nets.make("spiking_resnet18"), policy)
        for name in ("conv1.weight", "bn1.weight", "layer1.0.bn2.bias", "layer1.1.conv1.weight"):
            model.get_parameter(name).requires_grad_(False)
        found.append(nets.step(model, nets.images(steps=LONG)))
    assert fronts
    nets.assert_same(found[1], found[0], 1e-10)


def test_backward_leaves_the_net_as_it_was():
    model = apply_policy(nets.make("spiking_resnet18"), "layer+time:2")
    seen = []
    model.sn1.observer = lambda node, spikes, v: seen.append(spikes.shape[0])
    out = model(nets.images(steps=LONG))
    before = {n: b.clone() for n, b in model.named_buffers()} | {"v": model.layer1[1].sn2.v.clone()}
    calls = len(seen)
    with mock.patch.object(sweeps, "gradients", wraps=sweeps.gradients) as ran:
        out.sum().backward()
    assert all(x.kept is None for x in ran.call_args.args[0].inputs)
    nets.assert_same(dict(model.named_buffers()) | {"v": model.layer1[1].sn2.v}, before, 0.0)
    assert len(seen) == calls == 1


class Own(nn.Module):
    """A user's net that says of what pieces its forward is."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleList([layer.Conv2d(3, 12, 3, padding=1), layer.BatchNorm2d(12), neuron.IFNode()])
        self.block = nets.spiking_resnet.BasicBlock(
            12, 12, 1, None, 1, 64, 1, layer.BatchNorm2d, lambda: neuron.ParametricLIFNode(v_reset=None)
        )
        self.pool, self.last = layer.MaxPool2d(2), layer.Conv2d(12, 8, 3, bias=False)
        self.bn, self.sn = layer.BatchNorm2d(8), neuron.LIFNode()
        self.head = layer.Linear(8, 7)

    def forward(self, x):
        return self.end(self.narrow(self.block(self.begin(x))))

    def begin(self, x):
        conv, norm, node = self.stem
        return norm(conv(x), neuron=node)

    def narrow(self, x):
        return self.bn(self.last(self.pool(x)), neuron=self.sn)

    def end(self, x):
        return self.head(x.mean((-2, -1)))

    def pieces(self):
        return [
            Piece((self.stem,), self.begin),
            Piece((self.block,), self.block),
            Piece((self.pool, self.last, self.bn, self.sn), self.narrow),
            Piece((self.head,), self.end),
        ]


def test_a_net_of_ones_own_has_a_front(monkeypatch, compare, fronts):
    monkeypatch.setitem(nets.NETS, "own with pieces", Own)
    model = nets.make("own with pieces")
    model.bn = layer.BatchNorm2d(8, affine=False, step_mode="m").double()
    compare(model, "layer+time:2", nets.images(steps=LONG))
    assert fronts == [3]


class Other(nets.spiking_resnet.SpikingResNet):
    """A net whose forward is not its pieces."""

    def forward(self, x):
        return 2 * super().forward(x)


def other():
    model = nets.make("spiking_resnet18")
    model.__class__ = Other
    return model


def hooked(where):
    def make():
        model = nets.make("spiking_resnet18")
        model.get_submodule(where).register_forward_hook(lambda module, x, y: None)
        return model

    return make


def every_step():
    model = nets.make("spiking_resnet18")
    model.layer1[0].sn1.store_v_seq = True
    return model


@pytest.mark.parametrize(
    "make",
    [other, hooked("layer1"), hooked("layer1.0.conv2"), every_step, lambda: nets.make("sew_resnet18")],
    ids=["own forward", "hook on a stage", "hook on a convolution", "v_seq", "sums of spikes"],
)
def test_nets_that_have_no_front_are_exact_without(make, compare, fronts):
    compare(make(), "layer+time:2", nets.images(steps=LONG))
    assert fronts == []


def test_few_chunks_and_whole_have_no_front(fronts):
    for policy, steps in (("layer+time:3", LONG), ("layer+time:2,whole", LONG), ("time:2", LONG)):
        nets.step(apply_policy(nets.make("spiking_resnet18"), policy), nets.images(steps=steps))
    assert fronts == []


# ---------------------------------------------------------------------------------------------- memory, cost
def traced(policy, steps, batch=2):
    mode = FakeTensorMode()
    with mode:
        model = nets.NETS["spiking_resnet18"]()
        functional.set_step_mode(model, "m")
    return trace(model, (steps, batch, 3, 64, 64), Policy.parse(policy), mode=mode)


def test_no_gradient_of_the_first_stage_stands_whole():
    row = 24 * 16 * 64 * 16 * 16 * 4  # bytes of the largest
    assert traced("layer+time:4", 24, 16).peak() < traced("layer+time:4,whole", 24, 16).peak() - row / 2


def test_a_trace_of_one_round_counts_all():
    some = traced("layer+time:2", 10)
    with mock.patch.object(sweeps, "alike", lambda rounds, unlike=0: iter(rounds)):
        every = traced("layer+time:2", 10)
    assert some.peak() == pytest.approx(every.peak(), rel=0.02)
    assert some.flops == pytest.approx(every.flops, rel=0.1)
    assert some.traffic == pytest.approx(every.traffic, rel=0.1)


def test_rounds_are_left_out_in_a_trace_only():
    class Counter:
        times = 3

    counter = Counter()
    assert list(counting.alike(range(5))) == [0, 1, 2, 3, 4]
    with counting.counted_by(counter):
        assert [(i, counter.times) for i in counting.alike(range(5), unlike=1)] == [(0, 3), (2, 12)]
        assert [(i, counter.times) for i in counting.alike(range(4))] == [(1, 12)]
        assert [(i, counter.times) for i in counting.alike(range(1))] == [(0, 3)]
        assert list(counting.alike(range(0))) == []
    assert counter.times == 3
