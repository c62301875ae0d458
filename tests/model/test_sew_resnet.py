"""SEW ResNets against SpikingJelly, and the connecting functions against the paper."""

import pytest
import torch
import torchvision
from spikingjelly.activation_based import functional as peer_functional
from spikingjelly.activation_based import neuron as peer_neuron
from spikingjelly.activation_based import surrogate as peer_surrogate
from spikingjelly.activation_based.model import sew_resnet as peer

from scalesnn import functional, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.model import sew_resnet

NINE = [name for name in sew_resnet.__all__ if name.startswith(("sew_res", "sew_wide"))]


def build(name: str, **kwargs):
    kwargs = {"surrogate_function": surrogate.ATan(), "detach_reset": True, **kwargs}
    return getattr(sew_resnet, name)(spiking_neuron=neuron.IFNode, **kwargs)


@pytest.mark.parametrize("name", NINE)
def test_constructors_and_state_dicts(name):
    with torch.device("meta"):
        ours = build(name, cnf="ADD")
        theirs = getattr(torchvision.models, name.removeprefix("sew_"))()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert name in peer.__all__
    assert len(NINE) == 9


@pytest.mark.parametrize("cnf", ["ADD", "AND", "IAND"])
@pytest.mark.parametrize("name", ["sew_resnet18", "sew_resnet50"])
def test_outputs_and_gradients_equal_the_peers(name, cnf, monkeypatch):
    """SpikingJelly's bottleneck hands branch and shortcut to its IAND the wrong way round: turned here."""
    if name == "sew_resnet50" and cnf == "IAND":
        monkeypatch.setattr(peer, "sew_function", lambda x, y, cnf: y * (1.0 - x))
    torch.manual_seed(1)
    x_seq = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    kwargs = {"cnf": cnf, "num_classes": 10, "v_threshold": 0.2, "v_reset": None}
    ours = build(name, step_mode="m", **kwargs).double()
    theirs = getattr(peer, name)(
        spiking_neuron=peer_neuron.IFNode,
        surrogate_function=peer_surrogate.ATan(),
        detach_reset=True,
        **kwargs,
    ).double()
    theirs.load_state_dict(ours.state_dict())
    peer_functional.set_step_mode(theirs, "m")
    y, expected = ours(x_seq), theirs(x_seq)
    assert y.std(-2).max() > 0
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for out in (y, expected):
        out.square().sum().backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10 * b.grad.abs().max().item(), msg=key)


def test_connecting_functions_are_the_papers():
    shortcut, branch = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert sew_resnet.sew_function(shortcut, branch, "ADD").tolist() == [0, 1, 1, 2]
    assert sew_resnet.sew_function(shortcut, branch, "AND").tolist() == [0, 0, 0, 1]
    assert sew_resnet.sew_function(shortcut, branch, "IAND").tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("cnf", ["ADD", "IAND"])
@pytest.mark.parametrize("name", ["sew_resnet18", "sew_resnet50"])
def test_a_silent_branch_is_the_identity(name, cnf):
    """What residual learning rests on: with a branch that never fires, spikes pass a block unchanged."""
    block = build(name, cnf=cnf, step_mode="m").layer1[1]
    for node in (m for m in block.modules() if isinstance(m, neuron.BaseNode)):
        node.v_threshold = 1e9
    channels = block.conv1.in_channels
    spikes = (torch.rand(2, 2, channels, 6, 6) < 0.3).float()
    assert torch.equal(block(spikes), spikes)


@pytest.mark.parametrize("cnf", ["OR", None, "add"])
def test_other_connecting_functions_are_refused(cnf):
    with pytest.raises(UserError, match="cnf must be one of ADD, AND, IAND"):
        build("sew_resnet18", cnf=cnf)
    with pytest.raises(UserError, match="cnf must be one of ADD, AND, IAND"):
        sew_resnet.sew_function(torch.zeros(1), torch.zeros(1), cnf)


def test_step_modes_agree_in_evaluation():
    torch.manual_seed(0)
    net = build("sew_resnet18", num_classes=10, v_threshold=0.1).double().eval()
    x_seq = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    steps = torch.stack([net(x) for x in x_seq])
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert steps.std((0, 1)).max() > 0
    torch.testing.assert_close(net(x_seq), steps)


def test_print_shows_the_connecting_function():
    assert repr(build("sew_resnet18", cnf="IAND")).count("cnf=IAND") == 8
