"""Layers in both step modes against torch's, repeated images against copies, the unit, and containers."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import layer as peer
from torch import nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError

PAIRS = {
    "conv": (lambda m: m.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)),
    "conv without bias": (lambda m: m.Conv2d(4, 6, 3, dilation=2, bias=False, padding="same")),
    "bn": (lambda m: m.BatchNorm2d(4)),
    "bn without statistics": (lambda m: m.BatchNorm2d(4, track_running_stats=False, affine=False)),
    "group norm": (lambda m: m.GroupNorm(2, 4)),
    "max pool": (lambda m: m.MaxPool2d(3, stride=2, padding=1)),
    "avg pool": (lambda m: m.AvgPool2d(2, ceil_mode=True)),
    "adaptive avg pool": (lambda m: m.AdaptiveAvgPool2d((2, 1))),
    "linear": (lambda m: m.Linear(7, 5)),
    "flatten": (lambda m: m.Flatten()),
    "flatten space": (lambda m: m.Flatten(2)),
}


def pair(name: str, step_mode: str) -> tuple[nn.Module, nn.Module]:
    ours, theirs = PAIRS[name](layer).double(), PAIRS[name](nn).double()
    theirs.load_state_dict(ours.state_dict())
    ours.step_mode = step_mode
    return ours, theirs


@pytest.mark.parametrize("name", PAIRS)
@given(t=st.integers(1, 3), n=st.integers(1, 3), h=st.integers(5, 8), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_sequences_are_torchs_layer_over_time_and_batch(name, t, n, h, seed):
    x_seq = torch.randn(t, n, 4, h, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours, theirs = pair(name, "m")
    a, b = x_seq.clone().requires_grad_(), x_seq.clone().requires_grad_()
    y, expected = ours(a), theirs(b.flatten(0, 1)).unflatten(0, (t, n))
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.square().sum(), [a, *ours.parameters()])
    expected_grads = torch.autograd.grad(expected.square().sum(), [b, *theirs.parameters()])
    torch.testing.assert_close(grads, expected_grads)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", PAIRS)
def test_single_steps_are_torchs_layer(name):
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    ours, theirs = pair(name, "s")
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_a_repeated_image_gives_what_its_copies_give(name, training, momentum):
    repeated, materialised = pair(name, "m")[0], None
    if isinstance(repeated, layer.BatchNorm2d):
        repeated.momentum = momentum
    repeated.train(training)
    materialised = copy.deepcopy(repeated)
    for step in range(2):
        x = torch.randn(2, 4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = repeated(functional.repeat_over_time(a, 3)), materialised(b.repeat(3, 1, 1, 1, 1))
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(expected)
        grads = torch.autograd.grad((y * weights).sum(), [a, *repeated.parameters()])
        expected_grads = torch.autograd.grad((expected * weights).sum(), [b, *materialised.parameters()])
        torch.testing.assert_close(grads, expected_grads)
    torch.testing.assert_close(repeated.state_dict(), materialised.state_dict())


def test_a_repeated_image_goes_through_the_convolution_once():
    conv, shapes = layer.Conv2d(3, 4, 3, step_mode="m"), []
    conv._conv_forward = functools.partial(
        lambda f, x, *rest: (shapes.append(x.shape), f(x, *rest))[1], conv._conv_forward
    )
    conv(functional.repeat_over_time(torch.randn(2, 3, 8, 8), 5))
    assert shapes == [(2, 3, 8, 8)]


@pytest.mark.parametrize("name", ["conv", "bn", "max pool", "avg pool"])
def test_sequences_keep_channels_last_and_are_not_copied(name):
    ours = pair(name, "m")[0].float().to(memory_format=torch.channels_last)
    x = torch.randn(6, 4, 8, 7).to(memory_format=torch.channels_last)
    x_seq = x.unflatten(0, (3, 2))
    assert x_seq.flatten(0, 1).data_ptr() == x.data_ptr()
    assert ours(x_seq).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: layer.BatchNorm2d(4), lambda: layer.GroupNorm(2, 4)], ids=["bn", "group norm"]
)
def test_the_unit_is_norm_plus_residual_then_neuron(make, with_residual, step_mode):
    norm, node = make().double(), neuron.LIFNode(surrogate_function=surrogate.ATan(), v_threshold=0.3)
    unit = nn.ModuleList([norm, node])
    functional.set_step_mode(unit, step_mode)
    plain = copy.deepcopy(unit)
    shape = (3, 2, 4, 5, 5) if step_mode == "m" else (2, 4, 5, 5)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    a, b, r, q = (z.clone().requires_grad_() for z in (x, x, residual, residual))
    y = unit[0](a, neuron=unit[1], residual=r if with_residual else None)
    expected = plain[1](plain[0](b) + q if with_residual else plain[0](b))
    assert 0 < y.mean() < 1
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(x)
    grads = torch.autograd.grad((y * weights).sum(), [a, *norm.parameters()] + [r] * with_residual)
    expected_grads = torch.autograd.grad(
        (expected * weights).sum(), [b, *plain[0].parameters()] + [q] * with_residual
    )
    torch.testing.assert_close(grads, expected_grads)
    torch.testing.assert_close(unit[1].v, plain[1].v)
    torch.testing.assert_close(norm.state_dict(), plain[0].state_dict())


def test_residual_without_a_neuron_is_added():
    norm = layer.BatchNorm2d(4, step_mode="m")
    x, residual = torch.randn(2, 3, 2, 4, 5, 5)
    torch.testing.assert_close(norm(x, residual=residual), copy.deepcopy(norm)(x) + residual)


@pytest.mark.parametrize(
    ("module", "shape", "cure"),
    [
        (layer.Conv2d(3, 4, 3), (2, 1, 3, 8, 8), r"set_step_mode\(model, 'm'\)"),
        (layer.BatchNorm2d(3), (2, 1, 3, 8, 8), r"set_step_mode\(model, 'm'\)"),
        (layer.MaxPool2d(2), (2, 1, 3, 8, 8), r"set_step_mode\(model, 'm'\)"),
        (layer.Conv2d(3, 4, 3, step_mode="m"), (1, 3, 8, 8), r"set_step_mode\(model, 's'\)"),
        (layer.AvgPool2d(2, step_mode="m"), (8, 8), r"expects \[T, N, C, H, W\], got \(8, 8\)"),
    ],
)
def test_an_input_for_the_other_step_mode_is_refused_with_the_cure(module, shape, cure):
    with pytest.raises(UserError, match=cure):
        module(torch.zeros(shape))


class TestDropout:
    def test_one_mask_for_all_time_steps(self):
        x_seq = torch.ones(5, 3, 20)
        for step_mode in ("s", "m"):
            dropout = layer.Dropout(0.4, step_mode=step_mode)
            y = dropout(x_seq) if step_mode == "m" else torch.stack([dropout(x) for x in x_seq])
            assert torch.equal(y, y[:1].expand_as(y))
            torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.6]))

    def test_reset_draws_a_new_mask(self):
        dropout = layer.Dropout(0.5, step_mode="m")
        first = dropout(torch.ones(2, 200))
        assert torch.equal(first, dropout(torch.ones(2, 200)))
        functional.reset_net(dropout)
        assert not torch.equal(first, dropout(torch.ones(2, 200)))

    def test_evaluation_passes_everything(self):
        x_seq = torch.randn(2, 3, 4)
        assert torch.equal(layer.Dropout(0.5, step_mode="m").eval()(x_seq), x_seq)

    def test_equals_the_peers(self):
        results = []
        for module in (layer, peer):
            torch.manual_seed(3)
            results.append(module.Dropout(0.3, step_mode="m")(torch.ones(4, 3, 10)))
        assert torch.equal(*results)

    def test_bad_probability_and_left_over_mask_are_named(self):
        with pytest.raises(UserError, match=r"p of Dropout must be in \[0, 1\), got 1"):
            layer.Dropout(1)
        for step_mode, inputs in (("s", ((2, 3), (4, 3))), ("m", ((5, 2, 3), (5, 4, 3)))):
            dropout = layer.Dropout(step_mode=step_mode)
            dropout(torch.ones(inputs[0]))
            with pytest.raises(UserError, match="reset_net"):
                dropout(torch.ones(inputs[1]))


class TestContainers:
    def test_seq_to_ann_runs_all_time_steps_at_once(self):
        conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        container = layer.SeqToANNContainer(conv, bn)
        x_seq = torch.randn(3, 2, 3, 6, 6)
        expected = copy.deepcopy(bn)(conv(x_seq.flatten(0, 1))).unflatten(0, (3, 2))
        torch.testing.assert_close(container(x_seq), expected)
        assert list(container.state_dict())[:2] == ["0.weight", "0.bias"]

    def test_multi_step_runs_stateful_modules_step_by_step(self):
        container = layer.MultiStepContainer(nn.Linear(4, 4), neuron.IFNode())
        x_seq = torch.randn(5, 2, 4) + 1
        twin = copy.deepcopy(container)
        torch.testing.assert_close(container(x_seq), torch.stack([twin[1](twin[0](x)) for x in x_seq]))

    def test_children_stay_in_single_step_mode(self):
        net = nn.Sequential(layer.MultiStepContainer(neuron.IFNode()), neuron.IFNode())
        functional.set_step_mode(net, "m")
        assert (net[0].step_mode, net[0][0].step_mode, net[1].step_mode) == ("m", "s", "m")

    def test_a_child_in_multi_step_mode_is_refused(self):
        with pytest.raises(UserError, match="IFNode inside SeqToANNContainer"):
            layer.SeqToANNContainer(neuron.IFNode(step_mode="m"))


def test_an_empty_batch_passes_in_evaluation():
    net = nn.Sequential(
        layer.Conv2d(3, 4, 3),
        layer.BatchNorm2d(4),
        neuron.IFNode(),
        layer.AdaptiveAvgPool2d(1),
        layer.Flatten(),
    ).eval()
    functional.set_step_mode(net, "m")
    assert net(torch.zeros(2, 0, 3, 8, 8)).shape == (2, 0, 4)


def test_repr_shows_the_step_mode():
    for name in PAIRS:
        assert "step_mode=m" in repr(pair(name, "m")[0])
