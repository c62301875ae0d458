"""The nine nets: SpikingJelly's outputs and gradients on the same weights, torchvision's state dicts."""

import gc
import pickle
from functools import partial
from urllib.error import URLError

import pytest
import torch
import torchvision
from spikingjelly.activation_based import functional as peer_functional
from spikingjelly.activation_based import neuron as peer_neuron
from spikingjelly.activation_based import surrogate as peer_surrogate
from spikingjelly.activation_based.model import spiking_resnet as peer

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.model import sew_resnet, spiking_resnet
from scalesnn.model.resnet import ARCHITECTURES

NINE = [name for name in spiking_resnet.__all__ if name[0] == "s"]


def build(name: str, **kwargs):
    kwargs = {"surrogate_function": surrogate.ATan(), "detach_reset": True, **kwargs}
    return getattr(spiking_resnet, name)(spiking_neuron=kwargs.pop("spiking_neuron", neuron.IFNode), **kwargs)


def test_there_are_nine():
    assert len(NINE) == 9
    assert {f"spiking_{name}" for name in ARCHITECTURES} == set(NINE)


@pytest.mark.parametrize("name", NINE)
def test_state_dict_is_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = build(name), getattr(torchvision.models, name.removeprefix("spiking_"))()
    shapes, expected = (
        {k: (v.shape, v.dtype) for k, v in net.state_dict().items()} for net in (ours, theirs)
    )
    assert shapes == expected
    assert list(shapes) == list(expected)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", NINE)
def test_outputs_and_gradients_equal_the_peers(name, dtype, tolerance):
    """Training mode, T=2; the two nets share their weights, so that the widest fits a small machine."""
    torch.manual_seed(5)
    size = 64 if name.endswith(("18", "34")) else 32
    x_seq = torch.randn(2, 2, 3, size, size, dtype=dtype)
    weights = torch.randn(2, 2, 10, dtype=dtype)
    ours = build(name, num_classes=10).to(dtype)
    if (
        dtype == torch.float32
    ):  # a fused kernel may round otherwise, and a spike that flips is no small difference
        functional.set_backend(ours, "torch")
    functional.set_step_mode(ours, "m")
    with torch.device("meta"):
        theirs = getattr(peer, name)(
            spiking_neuron=peer_neuron.IFNode,
            surrogate_function=peer_surrogate.ATan(),
            detach_reset=True,
            num_classes=10,
        )
    theirs.load_state_dict(
        {k: v.clone() if "bn" in k else v for k, v in ours.state_dict().items()}, assign=True
    )
    peer_functional.set_step_mode(theirs, "m")
    y, expected = ours(x_seq), theirs(x_seq)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert b.grad.abs().max() > 0, key
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max(), key
        a.grad = b.grad = None
    for (key, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=key)
    del ours, theirs
    gc.collect()


@pytest.mark.parametrize("spiking_neuron", ["LIFNode", "ParametricLIFNode"])
def test_other_neurons_equal_the_peers(spiking_neuron):
    torch.manual_seed(0)
    x_seq = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    kwargs = {"v_threshold": 0.5, "v_reset": None, "decay_input": False, "num_classes": 5}
    ours = build("spiking_resnet18", spiking_neuron=getattr(neuron, spiking_neuron), **kwargs).double()
    theirs = peer.spiking_resnet18(
        spiking_neuron=getattr(peer_neuron, spiking_neuron),
        surrogate_function=peer_surrogate.ATan(),
        detach_reset=True,
        **kwargs,
    ).double()
    theirs.load_state_dict(ours.state_dict())
    functional.set_step_mode(ours, "m")
    peer_functional.set_step_mode(theirs, "m")
    for net in (ours, theirs):
        net(x_seq).square().sum().backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10 * b.grad.abs().max().item(), msg=key)


def test_step_modes_agree_in_evaluation():
    torch.manual_seed(0)
    net = build("spiking_resnet18", num_classes=10).double().eval()
    for module in net.modules():
        if isinstance(module, layer.BatchNorm2d):
            module.running_var.fill_(0.05)  # untrained statistics would leave the net silent
    x_seq = torch.randn(3, 2, 3, 64, 64, dtype=torch.float64)
    steps = torch.stack([net(x) for x in x_seq])
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert steps.std((0, 1)).max() > 0
    torch.testing.assert_close(net(x_seq), steps)


def test_a_repeated_image_gives_what_its_copies_give():
    results = []
    for repeat in (lambda x: functional.repeat_over_time(x, 3), lambda x: x.repeat(3, 1, 1, 1, 1)):
        torch.manual_seed(0)
        net = build("spiking_resnet18", num_classes=10, step_mode="m").double()
        x = torch.randn(2, 3, 48, 48, dtype=torch.float64, requires_grad=True)
        y = net(repeat(x.unsqueeze(0) if x.dim() == 5 else x))
        y.square().sum().backward()
        results.append([y.detach(), x.grad, net.conv1.weight.grad, net.bn1.running_var])
    torch.testing.assert_close(*results)


def test_a_step_mode_among_the_arguments_is_set_for_the_whole_net():
    functional.check_step_mode(build("spiking_resnet18", step_mode="m"), "m")


def test_a_sequence_for_a_net_in_single_step_mode_is_refused_with_the_cure():
    with pytest.raises(UserError, match=r"set_step_mode\(model, 'm'\)"):
        build("spiking_resnet18")(torch.zeros(2, 1, 3, 32, 32))


def test_every_neuron_has_its_own_surrogate_and_state():
    net = build("spiking_resnet18")
    nodes = [m for m in net.modules() if isinstance(m, neuron.BaseNode)]
    assert len(nodes) == 17
    assert len({id(node.surrogate_function) for node in nodes}) == 17


def test_print_shows_step_modes_and_neurons():
    net = build("spiking_resnet18", v_threshold=0.75)
    functional.set_step_mode(net, "m")
    text = repr(net)
    for part in (
        "Conv2d(3, 64",
        "BatchNorm2d(64",
        "MaxPool2d(",
        "AdaptiveAvgPool2d(",
        "Linear(in_features=512",
    ):
        (line,) = [line for line in text.splitlines() if part in line][:1]
        assert "step_mode=m" in line
    assert text.count("v_threshold=0.75, v_reset=0.0, detach_reset=True, step_mode=m, backend=") == 17
    assert text.count("(surrogate_function): ATan(alpha=2.0") == 17


def test_settings_of_the_net():
    net = build("spiking_resnet50", num_classes=7, zero_init_residual=True, in_channels=1, width_per_group=32)
    assert net.fc.out_features == 7
    assert net.conv1.in_channels == 1
    assert net.layer1[0].conv2.out_channels == 32
    assert all(block.bn3.weight.abs().max() == 0 for block in net.layer3)
    assert net.layer1[0].bn1.weight.min() == 1


def test_dilation_instead_of_stride():
    kwargs = {"num_classes": 5, "replace_stride_with_dilation": [False, True, True], "step_mode": "m"}
    net = build("spiking_resnet50", **kwargs)
    sizes = []
    net.layer4.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-2:])))
    net(torch.randn(1, 2, 3, 64, 64))
    assert sizes == [(8, 8)]
    assert net.layer4[1].conv2.dilation == (4, 4)


def test_group_norm_in_place_of_batch_norm():
    net = build("spiking_resnet18", num_classes=5, norm_layer=partial(layer.GroupNorm, 8), step_mode="m")
    net(torch.randn(2, 2, 3, 32, 32)).sum().backward()
    assert net.bn1.weight.grad is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("spiking_resnet18", groups=2), "groups=2"),
        (lambda: build("spiking_resnet50", replace_stride_with_dilation=[True]), "must have 3 elements"),
        (lambda: build("spiking_resnet18", tau=2.0), "IFNode does not take the arguments .*tau"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


class TestPretrained:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        """An empty torch.hub cache on a machine without internet."""

        def offline(*args, **kwargs):
            raise URLError("no route to host")

        monkeypatch.setattr("torch.hub.urlopen", offline)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        return tmp_path / "hub" / "checkpoints"

    def test_without_internet_says_which_file_to_put_where(self, cache):
        with pytest.raises(UserError) as caught:
            build("spiking_resnet18", pretrained=True)
        message = str(caught.value)
        assert "\n" not in message
        assert "resnet18-f37072fd.pth" in message
        assert str(cache) in message

    @pytest.mark.parametrize("spiking_neuron", [neuron.IFNode, neuron.ParametricLIFNode])
    def test_the_file_is_loaded_from_the_cache(self, cache, spiking_neuron):
        weights = torchvision.models.resnet18().state_dict()
        torch.save(weights, cache / "resnet18-f37072fd.pth")
        net = build("spiking_resnet18", pretrained=True, spiking_neuron=spiking_neuron)
        assert all(torch.equal(net.state_dict()[key], value) for key, value in weights.items())

    @pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps([1], protocol=2)[:-2]])
    def test_a_damaged_file_is_named(self, cache, content):
        (cache / "resnet18-f37072fd.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"damaged: delete .*resnet18-f37072fd\.pth"):
            build("spiking_resnet18", pretrained=True)

    @pytest.mark.parametrize(("classes", "channels"), [(10, 3), (1000, 2), (7, 1)])
    @pytest.mark.parametrize("make", [spiking_resnet.spiking_resnet18, sew_resnet.sew_resnet18])
    def test_another_head_or_stem_is_new_and_named(self, cache, caplog, make, classes, channels):
        weights = torchvision.models.resnet18().state_dict()
        torch.save(weights, cache / "resnet18-f37072fd.pth")
        own = make(pretrained=True, num_classes=classes, in_channels=channels).state_dict()
        assert own["fc.weight"].shape == (classes, 512)
        assert own["conv1.weight"].shape == (64, channels, 7, 7)
        new = {"fc.weight", "fc.bias"} if classes != 1000 else set()
        new |= {"conv1.weight"} if channels != 3 else set()
        same = {key for key in weights if key not in new}
        assert all(torch.equal(own[key], weights[key]) for key in same)
        said = " ".join(caplog.messages)
        assert (f"a new classifier for {classes} classes (theirs is for 1000)" in said) == (classes != 1000)
        assert (f"a new first convolution for {channels} channels (theirs is for 3)" in said) == (
            channels != 3
        )

    def test_a_net_of_other_layers_is_refused(self, cache):
        torch.save(torchvision.models.resnet34().state_dict(), cache / "resnet18-f37072fd.pth")
        with pytest.raises(UserError, match=r"does not fit SpikingResNet: it has layer1\.2\.conv1\.weight, "):
            build("spiking_resnet18", pretrained=True, num_classes=10)

    def test_progress_can_be_silent(self, cache, capsys):
        torch.save(torchvision.models.resnet18().state_dict(), cache / "resnet18-f37072fd.pth")
        build("spiking_resnet18", pretrained=True, progress=False)
        assert capsys.readouterr().err == ""
