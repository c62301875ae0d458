"""Neurons against SpikingJelly, against the written-out equations, and one step mode against the other."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron as peer
from spikingjelly.activation_based import surrogate as peer_surrogate

from scalesnn import neuron, surrogate
from scalesnn.base import UserError

SURROGATES = [name for name in surrogate.__all__ if name[0].isupper() and name != "SurrogateFunctionBase"]
KINDS = {
    "IF": ("IFNode", {}),
    "LIF": ("LIFNode", {"tau": 1.7, "decay_input": True}),
    "LIF without input decay": ("LIFNode", {"tau": 1.7, "decay_input": False}),
    "PLIF": ("ParametricLIFNode", {"init_tau": 1.6, "decay_input": True}),
    "PLIF without input decay": ("ParametricLIFNode", {"init_tau": 1.6, "decay_input": False}),
}
RESETS = {"hard": 0.0, "hard to -0.3": -0.3, "soft": None}


def run(node, x_seq, weights):
    """Two sequences after one another (the state carries over): spikes, last v, gradients of x and w."""
    x_seq = x_seq.clone().requires_grad_()
    spikes = torch.cat([node(half) for half in x_seq.split(3)])
    loss = (spikes * weights).sum() + node.v.sum()
    inputs = [x_seq, *node.parameters()]
    return [spikes.detach(), node.v.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("detach_reset", [False, True], ids=["reset in graph", "reset detached"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SURROGATES)
def test_spikes_and_gradients_equal_the_peers(name, kind, reset, detach_reset, dtype, tolerance):
    generator = torch.Generator().manual_seed(7)
    x_seq = torch.randn(6, 2, 5, generator=generator, dtype=torch.float64).to(dtype) + 0.4
    weights = torch.randn(6, 2, 5, generator=generator, dtype=torch.float64).to(dtype)
    cls, kwargs = KINDS[kind]
    common = {
        "v_threshold": 0.8,
        "v_reset": RESETS[reset],
        "detach_reset": detach_reset,
        "step_mode": "m",
        **kwargs,
    }
    ours = getattr(neuron, cls)(surrogate_function=getattr(surrogate, name)(), **common).to(dtype)
    theirs = getattr(peer, cls)(surrogate_function=getattr(peer_surrogate, name)(), **common).to(dtype)
    results = run(ours, x_seq, weights), run(theirs, x_seq, weights)
    assert 0 < results[0][0].mean() < 1
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def equations(x, v, *, tau, decay_input, v_threshold, v_reset, detach_reset, grad_spikes, grad_v, derivative):
    """The forward and backward recursions of the neuron, in numpy; tau None is IF."""
    rest = v_reset or 0.0
    spikes, charges = [], []
    for x_t in x:
        if tau is None:
            h = v + x_t
        elif decay_input:
            h = v + (x_t - (v - rest)) / tau
        else:
            h = v - (v - rest) / tau + x_t
        s = (h >= v_threshold).astype(float)
        v = h - v_threshold * s if v_reset is None else h * (1 - s) + v_reset * s
        spikes.append(s)
        charges.append(h)
    grad_x, carried = np.zeros_like(x), grad_v
    for t in reversed(range(len(x))):
        h, s, g = charges[t], spikes[t], derivative(charges[t] - v_threshold)
        through_reset = 0 if detach_reset else g
        dv_dh = 1 - v_threshold * through_reset if v_reset is None else 1 - s + (v_reset - h) * through_reset
        dh = grad_spikes[t] * g + carried * dv_dh
        grad_x[t] = dh / tau if tau is not None and decay_input else dh
        carried = dh if tau is None else dh * (1 - 1 / tau)
    return np.stack(spikes), v, grad_x


@pytest.mark.parametrize(("reset", "detach_reset"), list(itertools.product(RESETS, [False, True])))
@pytest.mark.parametrize(("tau", "decay_input"), [(None, True), (2.5, True), (2.5, False)])
def test_forward_and_backward_follow_the_equations(tau, decay_input, reset, detach_reset):
    rng = np.random.default_rng(1)
    x, grad_spikes, grad_v = rng.normal(0.5, 1, (7, 4)), rng.normal(size=(7, 4)), rng.normal(size=4)
    expected = equations(
        x,
        np.full(4, RESETS[reset] or 0.0),
        tau=tau,
        decay_input=decay_input,
        v_threshold=0.9,
        v_reset=RESETS[reset],
        detach_reset=detach_reset,
        grad_spikes=grad_spikes,
        grad_v=grad_v,
        derivative=lambda y: 1 / (1 + (np.pi * y) ** 2),
    )
    common = {
        "v_threshold": 0.9,
        "v_reset": RESETS[reset],
        "detach_reset": detach_reset,
        "surrogate_function": surrogate.ATan(),
        "step_mode": "m",
    }
    node = (
        neuron.IFNode(**common) if tau is None else neuron.LIFNode(tau=tau, decay_input=decay_input, **common)
    )
    x_seq = torch.tensor(x, requires_grad=True)
    spikes = node(x_seq)
    v = node.v
    (grad_x,) = torch.autograd.grad([spikes, v], x_seq, [torch.tensor(grad_spikes), torch.tensor(grad_v)])
    for ours, theirs in zip((spikes.detach(), v.detach(), grad_x), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-12)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    reset=st.sampled_from(sorted(RESETS)),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_step_modes_agree(kind, reset, shape, seed):
    cls, kwargs = KINDS[kind]
    single = getattr(neuron, cls)(v_reset=RESETS[reset], store_v_seq=True, **kwargs).double()
    multi = copy.deepcopy(single)
    multi.step_mode = "m"
    x_seq = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    a, b = x_seq.clone().requires_grad_(), x_seq.clone().requires_grad_()
    steps, sequence = torch.stack([single(x) for x in a]), multi(b)
    assert sequence.shape == x_seq.shape
    torch.testing.assert_close(steps, sequence)
    torch.testing.assert_close(single.v_seq, multi.v_seq)
    torch.testing.assert_close(multi.v_seq[-1], multi.v)
    steps.sum().backward()
    sequence.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_v_is_a_float_before_the_first_step_and_after_reset():
    for v_reset, start in ((None, 0.0), (0.0, 0.0), (-0.5, -0.5)):
        node = neuron.IFNode(v_reset=v_reset)
        assert node.v == start
        node(torch.ones(2))
        assert isinstance(node.v, torch.Tensor)
        node.reset()
        assert node.v == start


def test_state_is_no_part_of_state_dict_and_stays_out_of_copies():
    node = neuron.LIFNode(step_mode="m", store_v_seq=True)
    node(torch.randn(2, 3, requires_grad=True))
    assert node.state_dict() == {}
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert twin.v == 0.0
        assert twin.v_seq is None
        assert twin.step_mode == "m"
    assert isinstance(node.v, torch.Tensor)


def test_state_moves_with_the_module():
    node = neuron.IFNode()
    node(torch.ones(2))
    node.to(torch.float64)
    assert node.v.dtype == torch.float64


def test_half_precision_inputs_keep_a_float32_state():
    x_seq = torch.randn(5, 100) * 0.3 + 0.2
    node, reference = neuron.LIFNode(step_mode="m", tau=3.0), neuron.LIFNode(step_mode="m", tau=3.0)
    spikes = node(x_seq.to(torch.bfloat16))
    expected = reference(x_seq.to(torch.bfloat16).float())
    assert spikes.dtype == torch.bfloat16
    assert node.v.dtype == torch.float32
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(node.v, reference.v)


def test_sequence_keeps_channels_last():
    x_seq = torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last).unflatten(0, (3, 2))
    spikes = neuron.IFNode(step_mode="m")(x_seq)
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_observer_sees_spikes_and_last_potential():
    seen = []
    node = neuron.IFNode(step_mode="m")
    node.observer = lambda *arguments: seen.append(arguments)
    spikes = node(torch.randn(3, 2, requires_grad=True))
    ((who, seen_spikes, v),) = seen
    assert who is node
    assert torch.equal(seen_spikes, spikes)
    assert torch.equal(v, node.v)
    assert not seen_spikes.requires_grad
    assert not v.requires_grad


def test_a_neuron_of_ones_own_defines_its_charge():
    class Doubling(neuron.BaseNode):
        def neuronal_charge(self, x):
            self.v = self.v + 2 * x

    assert Doubling(step_mode="m")(torch.tensor([[0.3], [0.3]])).flatten().tolist() == [0.0, 1.0]


def test_plif_starts_at_init_tau():
    node = neuron.ParametricLIFNode(init_tau=4.0)
    assert 1 / node.w.sigmoid().item() == pytest.approx(4.0)
    assert list(node.state_dict()) == ["w"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: neuron.LIFNode(tau=1.0), "tau of LIFNode must be greater than 1, got 1.0"),
        (
            lambda: neuron.ParametricLIFNode(init_tau=0.5),
            "init_tau of ParametricLIFNode must be greater than 1",
        ),
        (lambda: neuron.IFNode(step_mode="x"), "step_mode of IFNode must be 's' or 'm', got 'x'"),
        (lambda: neuron.IFNode(backend="triton"), "backend of IFNode must be one of .*, got 'triton'"),
        (lambda: neuron.IFNode(step_mode="m")(torch.zeros(0, 3)), "T >= 1"),
    ],
)
def test_bad_settings_are_named(action, message):
    with pytest.raises(UserError, match=message):
        action()


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_state_left_over_from_another_batch_size_is_refused(step_mode):
    node = neuron.IFNode(step_mode=step_mode)
    node(torch.zeros(2, 4, 3))
    with pytest.raises(UserError, match="reset_net"):
        node(torch.zeros(2, 5, 3) if step_mode == "m" else torch.zeros(2, 5, 3)[:, 0])


def test_repr_shows_settings():
    text = repr(neuron.LIFNode(tau=3.0, v_threshold=0.7, surrogate_function=surrogate.ATan()))
    for part in ("v_threshold=0.7", "tau=3.0", "step_mode=s", "backend=", "ATan(alpha=2.0"):
        assert part in text
