"""Convolutions lie in channels_last whatever the user does: weights, outputs, whole nets fed plain images."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file, save_model
from spikingjelly.activation_based import neuron as peer_neuron
from spikingjelly.activation_based import surrogate as peer_surrogate
from spikingjelly.activation_based.model import spiking_resnet as peer
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.kernels import spike_conv
from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet

LAST = torch.channels_last


def lies_last(x: Tensor) -> bool:
    """Channels are neighbours in memory; the strides of a 1 × 1 kernel or image say so, too."""
    return x.is_contiguous(memory_format=LAST) and x.stride(1) == 1


def small_net() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(3, 8, 3), nn.Sequential(layer.Conv2d(8, 6, 1)), layer.Conv2d(6, 6, 3, groups=3)
    )


def weights_lie_last(net: nn.Module) -> bool:
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    return bool(weights) and all(lies_last(w) for w in weights)


def test_weights_lie_last_from_their_construction():
    assert weights_lie_last(small_net())
    with torch.device("meta"):
        assert weights_lie_last(small_net())
    for make in (spiking_resnet.spiking_resnet18, sew_resnet.sew_resnet18, ms_resnet.ms_resnet18):
        assert weights_lie_last(make())


def with_plain_state(assign: bool):
    def load(net: nn.Module) -> nn.Module:
        state = {
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in net.state_dict().items()
        }
        assert not all(lies_last(v) for v in state.values() if v.dim() == 4)
        net.load_state_dict(state, assign=assign)
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name])
        return net

    return load


@pytest.mark.parametrize(
    "change",
    [
        with_plain_state(assign=False),
        with_plain_state(assign=True),
        lambda net: net.to(torch.float64),
        lambda net: net.bfloat16().float(),
        lambda net: net.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
    ],
    ids=["load_state_dict", "assign", "to", "bfloat16", "to_empty", "deepcopy", "pickle"],
)
def test_weights_stay_last(change):
    assert weights_lie_last(change(small_net()))


def test_a_frozen_weight_stays_frozen_when_a_state_is_assigned():
    conv = layer.Conv2d(3, 4, 3).requires_grad_(False)
    conv.load_state_dict(nn.Conv2d(3, 4, 3).state_dict(), assign=True)
    assert not conv.weight.requires_grad
    assert conv.weight.is_leaf


@pytest.mark.parametrize("row_major", [False, True], ids=["channels_last weight", "row-major weight"])
@pytest.mark.parametrize("kind", ["step", "sequence", "repeated", "grey", "spikes", "autocast"])
def test_outputs_lie_last_for_plain_inputs(kind, row_major):
    """Row-major weights: those of FSDP2, of ZeRO's flat buffers, and of a net that the user made so."""
    channels = 1 if kind == "grey" else 32
    conv = layer.Conv2d(channels, 32, 3, padding=1, step_mode="s" if kind == "step" else "m")
    twin = nn.Conv2d(channels, 32, 3, padding=1)
    twin.load_state_dict(conv.state_dict())
    if row_major:
        conv = conv.to(memory_format=torch.contiguous_format)
        assert not lies_last(conv.weight)
    x = torch.randn(2, channels, 6, 5)
    if kind == "sequence":
        x = torch.randn(3, 2, 32, 6, 5)
    elif kind in ("repeated", "grey"):
        x = functional.repeat_over_time(x, 3)
    elif kind in ("spikes", "autocast"):
        x = neuron.IFNode(step_mode="m")(torch.randn(3, 2, 32, 6, 5))
    assert x[0].is_contiguous()
    half = kind == "autocast"
    with torch.autocast("cpu", enabled=half):
        y = conv(x)
    y, x = (y, x) if kind == "step" else (y[0], x[0])
    assert lies_last(y)
    torch.testing.assert_close(y.float(), twin(x), rtol=1e-4, atol=5e-2 if half else 1e-5)


def formats_of(net: nn.Module, x: Tensor) -> dict[str, bool]:
    """For every convolution of the net, whether its output lies last."""
    found: dict[str, bool] = {}
    for name, module in net.named_modules():
        if isinstance(module, layer.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, y, name=name: found.__setitem__(name, lies_last(y[0]))
            )
    net(x)
    return found


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    "make",
    [spiking_resnet.spiking_resnet18, sew_resnet.sew_resnet50, ms_resnet.ms_resnet18],
    ids=["spiking", "sew", "ms"],
)
def test_whole_nets_run_last_from_plain_images(make, static):
    net = make(num_classes=4, step_mode="m")
    x = functional.repeat_over_time(torch.randn(1, 3, 32, 32), 2) if static else torch.randn(2, 1, 3, 32, 32)
    formats = formats_of(net, x)
    assert len(formats) >= 20
    assert [name for name, last in formats.items() if not last] == []


def test_a_plain_loop_looks_its_spikes_up(monkeypatch):
    """What makes a loop of one's own fast: from plain images on, every convolution of spikes is looked up."""
    taken = []
    for name in ("convolve", "weight_gradient"):
        plain = getattr(spike_conv, name)
        monkeypatch.setattr(
            spike_conv, name, lambda *args, name=name, plain=plain: (taken.append(name), plain(*args))[1]
        )
    net = spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), num_classes=4, step_mode="m"
    )
    net(torch.randn(2, 1, 3, 32, 32)).sum().backward()
    others = len([m for m in net.modules() if isinstance(m, layer.Conv2d)]) - 1  # the first takes images
    assert taken.count("convolve") == taken.count("weight_gradient") == others


def test_float64_with_groups_takes_the_contiguous_path(monkeypatch):
    """oneDNN has no float64; torch's own convolution with groups is six times slower in channels_last."""
    seen = []
    conv = layer.Conv2d(8, 8, 3, groups=8, step_mode="m").double()
    plain = conv._conv_forward
    monkeypatch.setattr(conv, "_conv_forward", lambda x, w, b: (seen.append((x, w)), plain(x, w, b))[1])
    x = torch.randn(2, 2, 8, 6, 6, dtype=torch.float64)
    y = conv(x)
    assert seen[0][0].is_contiguous()
    assert seen[0][1].is_contiguous()
    assert lies_last(y.flatten(0, 1))
    torch.testing.assert_close(
        y.flatten(0, 1), nn.functional.conv2d(x.flatten(0, 1), conv.weight, conv.bias, groups=8)
    )


def test_the_same_seed_gives_the_peers_weights():
    torch.manual_seed(7)
    ours = spiking_resnet.spiking_resnet18(spiking_neuron=neuron.IFNode, num_classes=10)
    torch.manual_seed(7)
    theirs = peer.spiking_resnet18(
        spiking_neuron=peer_neuron.IFNode,
        surrogate_function=peer_surrogate.ATan(),
        num_classes=10,
    )
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name


class TestReaders:
    """Whoever reads a state dict or a file finds the names, shapes and values that he always found."""

    def test_torch_save_and_torchvision(self):
        net = spiking_resnet.spiking_resnet18()
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        theirs = torchvision.models.resnet18()
        theirs.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(theirs.layer1[0].conv1.weight, net.layer1[0].conv1.weight)

    def test_a_state_dict_is_the_weights_themselves(self):
        """Averages that are written through the state dict (timm's) reach the net."""
        conv = layer.Conv2d(3, 4, 3)
        conv.state_dict()["weight"].fill_(2)
        assert torch.equal(conv.weight, torch.full_like(conv.weight, 2))

    def test_safetensors(self, tmp_path):
        net = small_net()
        save_model(net, str(tmp_path / "model.safetensors"))
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "state.safetensors")
        for name in ("model", "state"):
            found = load_file(tmp_path / f"{name}.safetensors")
            for key, value in net.state_dict().items():
                assert torch.equal(found[key], value)
