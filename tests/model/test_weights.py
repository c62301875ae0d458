"""Files of weights into networks: every wrapper and prefix, what may differ, and refusals in one line."""

import argparse
import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from scalesnn import neuron
from scalesnn.base import UserError
from scalesnn.model.ms_resnet import ms_resnet18, ms_resnet104
from scalesnn.model.spiking_resnet import spiking_resnet18
from scalesnn.model.weights import Weights, fit_weights, read_weights_file


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=10).state_dict()


def small(**settings):
    return spiking_resnet18(num_classes=10, **settings)


def same(net, state):
    own = net.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items())


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3, "best": np.float64(1.5), "args": argparse.Namespace(T=4)},
    "state_dict": lambda s: {"state_dict": prefixed(s, "module."), "optimizer": {"state": {}}},
    "model_state_dict": lambda s: {"model_state_dict": prefixed(s, "_orig_mod.")},
    "net": lambda s: {"net": prefixed(s, "module._orig_mod.")},
    "ema": lambda s: {"ema": {**prefixed(s, "module."), "n_averaged": torch.tensor(4)}},
    "twice": lambda s: {"model": {"state_dict": s}},
    "surrogates": lambda s: {**s, "layer1.0.sn1.surrogate_function.alpha": torch.ones(())},
    "fsdp": lambda s: {
        k.replace("layer1.0.", "layer1.0._fsdp_wrapped_module."): v
        for k, v in prefixed(s, "_orig_mod.").items()
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_every_wrapper_and_prefix_comes_off(state, tmp_path, wrap):
    torch.save(wrap(state), tmp_path / "net.pth")
    weights = read_weights_file(tmp_path / "net.pth")
    net = small()
    fit = fit_weights(net, weights)
    assert same(net, state)
    assert (fit.anew, fit.ends, fit.neurons) == ([], [], [])
    assert weights.settings == ({"T": 4} if "args" in wrap(state) else {})


def test_safetensors_of_any_name(state, tmp_path):
    save_file(state, tmp_path / "net.bin", metadata={"classes": '["a", "b"]'})
    weights = read_weights_file(tmp_path / "net.bin")
    assert weights.classes == ["a", "b"]
    net = small()
    fit_weights(net, weights)
    assert same(net, state)


def test_of_two_wrappers_the_weights_are_taken_and_it_is_said(state, tmp_path):
    torch.save({"ema": prefixed(state, "x."), "model": state}, tmp_path / "net.pt")
    weights = read_weights_file(tmp_path / "net.pt")
    assert list(weights.tensors) == list(state)
    assert "holds model, ema: model is taken" in weights.notices[0]


def test_a_wrapper_without_tensors_is_none(state, tmp_path):
    torch.save({"model": {"name": "resnet18"}, "state_dict": state}, tmp_path / "net.pt")
    assert list(read_weights_file(tmp_path / "net.pt").tensors) == list(state)


def test_a_file_that_holds_itself_ends(tmp_path):
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(UserError, match="holds no weights"):
        read_weights_file(tmp_path / "net.pt")


def test_odd_metadata_are_none(state, tmp_path):
    odd = OrderedDict(state)
    odd._metadata = ["classes"]
    torch.save(odd, tmp_path / "net.pt")
    assert read_weights_file(tmp_path / "net.pt").classes == []


def test_files_in_the_format_before_torch_1_6(state, tmp_path):
    torch.save({"model": state}, tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    assert list(read_weights_file(tmp_path / "net.pt").tensors) == list(state)


def saved(content):
    """The bytes of a file that ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Net(nn.Module):
    """Somebody's own network, pickled whole."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: pickle.dumps({"model": Net()}), "damaged, or no file of weights"),
        (lambda: b"", "damaged, or no file of weights"),
        (lambda: b"<html>not found</html>", "damaged, or no file of weights"),
        (lambda: (9).to_bytes(8, "little") + b"{" + b"x" * 30, "damaged, or no safetensors file"),
        (lambda: saved({"epoch": 3}), "holds no weights"),
        (lambda: saved([1, 2]), "holds no weights"),
    ],
)
def test_what_is_no_file_of_weights_is_one_line(tmp_path, content, said):
    (tmp_path / "net.pth").write_bytes(content())
    with pytest.raises(UserError) as caught:
        read_weights_file(tmp_path / "net.pth")
    assert said in str(caught.value)
    assert str(tmp_path / "net.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_not_run(state, tmp_path):
    torch.save({"model": state, "extra": Bomb(tmp_path / "exploded")}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="holds pickled code"):
        read_weights_file(tmp_path / "net.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_whole_network_and_a_torchscript_are_refused_by_name(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"pickled code \(torch\.nn\.modules\.container\.Sequential\)"):
        read_weights_file(tmp_path / "net.pth")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "net.ts")
    with pytest.raises(UserError, match="is a TorchScript program"):
        read_weights_file(tmp_path / "net.ts")


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="cannot be read"):
            read_weights_file(path)


@pytest.mark.parametrize(("classes", "channels"), [(4, 3), (10, 2), (4, 1)])
def test_another_head_or_stem_is_new(state, classes, channels):
    torch.manual_seed(5)
    net = spiking_resnet18(num_classes=classes, in_channels=channels)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    fit = fit_weights(net, Weights(dict(state), "FILE"))
    assert torch.equal(torch.get_rng_state(), random), "random numbers were drawn"
    anew = {"fc.weight", "fc.bias"} if classes != 10 else set()
    anew |= {"conv1.weight"} if channels != 3 else set()
    assert set(fit.anew) == anew
    assert len(fit.ends) == (classes != 10) + (channels != 3)
    own = net.state_dict()
    assert all(torch.equal(own[key], before[key]) for key in anew)
    assert same(net, {key: value for key, value in state.items() if key not in anew})


def test_the_deep_stem_of_ms_resnet104_is_known_by_its_place():
    net = ms_resnet104(layers=(1, 1, 1, 1), num_classes=3)
    fit = fit_weights(
        net, Weights(ms_resnet104(layers=(1, 1, 1, 1), num_classes=3, in_channels=1).state_dict(), "F")
    )
    assert fit.anew == ["conv1.0.weight"]


def test_neurons_of_another_kind_or_shape_are_no_obstacle(state):
    plif = small(spiking_neuron=neuron.ParametricLIFNode, init_tau=3.0)
    fit = fit_weights(plif, Weights(dict(state), "FILE"))
    assert "keep their new values where the file has none: sn1.w" in fit.neurons[0]
    assert plif.sn1.w.item() == pytest.approx(
        small(spiking_neuron=neuron.ParametricLIFNode, init_tau=3.0).sn1.w.item()
    )
    learned = {k: v + 0.5 if k.endswith(".w") else v for k, v in plif.state_dict().items()}
    again = small(spiking_neuron=neuron.ParametricLIFNode)
    assert fit_weights(again, Weights(dict(learned), "FILE")).neurons == []
    assert torch.equal(again.sn1.w, learned["sn1.w"])
    fit = fit_weights(small(), Weights(dict(learned), "FILE"))
    assert "parameters of other neurons are left out: sn1.w, layer1.0.sn1.w" in fit.neurons[0]
    learned["sn1.w"] = torch.ones(4, 4)
    fit = fit_weights(again, Weights(dict(learned), "FILE"))
    assert "neurons keep their new values where theirs have another shape" in fit.neurons[0]
    assert "sn1.w ([4, 4], here [])" in fit.neurons[0]


def test_files_without_the_counters_of_batchnorm_load(state):
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    net = small()
    fit_weights(net, Weights(old, "FILE"))
    assert same(net, old)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: [s.pop(k) for k in list(s) if "layer4" in k],
            "it lacks layer4.0.conv1.weight, layer4.0.bn1.weight, ",
        ),
        (lambda s: s.update(a=s["fc.bias"], b=s["fc.bias"]), "it has a, b, which the network has not"),
        (
            lambda s: s.update({"bn1.weight": torch.ones(3), "conv1.weight": torch.ones(64, 2, 5, 5)}),
            "conv1.weight is [64, 2, 5, 5], here [64, 3, 7, 7], bn1.weight is [3], here [64]",
        ),
        (lambda s: s.update({"fc.weight": torch.ones(4, 99)}), "fc.weight is [4, 99], here [10, 512]"),
        (lambda s: s.pop("fc.weight"), "it lacks fc.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(state, change, said):
    given = dict(state)
    change(given)
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        fit_weights(net, Weights(given, "FILE"))
    assert str(caught.value).startswith("FILE does not fit SpikingResNet: ")
    assert said in str(caught.value)
    assert same(net, before)


def test_of_many_keys_three_of_each_kind_are_named():
    other = ms_resnet18(num_classes=10, layers=(1, 1, 1, 1)).state_dict()
    said = r"it lacks (\S+, ){2}\S+ and 37 more; it has (\S+, ){2}\S+ and 3 more, which the network has not$"
    with pytest.raises(UserError, match=said):
        fit_weights(small(), Weights(dict(other), "F"))
