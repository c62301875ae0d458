"""Published weights: the authors' structures rebuilt, imported, and compared logit by logit."""

import argparse
import json

import pytest
import torch
from published_nets import Container, FlatContainer, MemUpdate, MSNet, OldIF, OldPSN, OldResNet, randomise
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from scalesnn import functional, layer, neuron
from scalesnn.cli import main as command
from scalesnn.import_command import SAME_NEXT
from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet
from scalesnn.model.published import recognise, rename

T, CLASSES = 3, 5


@pytest.fixture
def x():
    torch.manual_seed(4)
    return torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2


def assert_same_logits(ours, theirs, x, state):
    """Our net with ``state`` against the authors' on the same images."""
    ours.double().eval().load_state_dict(state, strict=True)
    functional.set_step_mode(ours, "m")
    with torch.no_grad():
        expected = theirs(x)
        found = ours(functional.repeat_over_time(x, T)).mean(0)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def settings_in(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["settings"])


@pytest.mark.parametrize(("sew", "model"), [(True, "sew_resnet18"), (False, "spiking_resnet18")])
def test_the_sew_authors_nets(x, tmp_path, capsys, sew, model):
    torch.manual_seed(1)
    theirs = randomise(OldResNet((2, 2, 2, 2), CLASSES, T, sew=sew))
    flags = argparse.Namespace(T=T, connect_f="add" if sew else None)
    content = {
        "model": {f"module.{k}": v for k, v in theirs.state_dict().items()},
        "args": flags,
        "epoch": 319,
    }
    torch.save(content, tmp_path / "checkpoint_319.pth")
    output = tmp_path / "out" / "net.safetensors"
    assert command(["import", str(tmp_path / "checkpoint_319.pth"), "-o", str(output), "--model", model]) == 0
    said = capsys.readouterr().out
    assert "recognised as weights of the SEW-ResNet authors' code" in said
    assert f"{model} for {CLASSES} classes" in said
    cnf = {"cnf": "ADD"} if sew else {}
    assert settings_in(output) == {"model": model, "T": T, "neuron": "IF", **cnf}
    module = sew_resnet if sew else spiking_resnet
    assert_same_logits(getattr(module, model)(num_classes=CLASSES), theirs, x, load_file(output))
    other = "spiking_resnet18" if sew else "sew_resnet18"  # in which the shapes would fit
    assert command(["import", str(tmp_path / "checkpoint_319.pth"), "-o", str(output), "--model", other]) == 2
    assert f"--model {other}: " in capsys.readouterr().err


@pytest.mark.parametrize(("sew", "wrap"), [(True, Container), (False, FlatContainer)])
def test_bottlenecks_and_both_kinds_of_containers(x, sew, wrap):
    torch.manual_seed(1)
    theirs = randomise(OldResNet((1, 2, 1, 1), CLASSES, T, sew=sew, wrap=wrap, bottleneck=True))
    module = sew_resnet if sew else spiking_resnet
    kind, block = (module.SEWResNet, module.Bottleneck) if sew else (module.SpikingResNet, module.Bottleneck)
    published = rename(theirs.state_dict(), "sew")
    assert published.family == ("sew" if sew else "spiking")
    assert_same_logits(kind(block, (1, 2, 1, 1), num_classes=CLASSES), theirs, x, published.tensors)
    with torch.device("meta"):
        other = OldResNet((1, 1, 1, 1), CLASSES, T, sew=sew, wrap=FlatContainer if sew else Container)
        expected = kind(module.BasicBlock, (1, 1, 1, 1), CLASSES)
    again = rename(other.state_dict(), "sew")
    assert again.family == published.family
    assert set(again.tensors) == set(expected.state_dict())


def test_the_ms_authors_net(x, tmp_path, capsys):
    torch.manual_seed(1)
    theirs = randomise(MSNet((2, 2, 2, 2), CLASSES, T))
    torch.save({f"module.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "resnet18-125-best.pth")
    output = tmp_path / "net.safetensors"
    words = ["import", str(tmp_path / "resnet18-125-best.pth"), "-o", str(output), "--model"]
    assert command([*words, "ms_resnet18"]) == 0
    said = capsys.readouterr().out
    assert "recognised as weights of the MS-ResNet authors' code" in said
    assert "fire at h > 0.5, ours at h >= 0.5" in said
    assert settings_in(output) == {"model": "ms_resnet18", "T": 6}
    assert_same_logits(ms_resnet.ms_resnet18(num_classes=CLASSES), theirs, x, load_file(output))
    assert command([*words, "ms_resnet34"]) == 2
    assert (
        "does not fit ms_resnet34: it is a ms_resnet18; it lacks layer1.2.conv1.weight"
        in capsys.readouterr().err
    )
    assert command([*words, "sew_resnet18"]) == 2
    assert "give ms_resnet18 or another of its kind" in capsys.readouterr().err


def test_the_deep_stem_of_the_ms_authors_104(x):
    torch.manual_seed(1)
    theirs = randomise(MSNet((1, 2, 1, 1), CLASSES, T, deep=True))
    ours = ms_resnet.MSResNet((1, 2, 1, 1), num_classes=CLASSES, deep_stem=True, dropout=0.2)
    assert_same_logits(ours, theirs, x, rename(theirs.state_dict(), "ms").tensors)


def test_the_next_threshold_fires_as_the_ms_authors_do():
    """Charges that are 0.5 exactly: a threshold of 0.5 differs there, the next float32 does not."""
    x = torch.randint(-2, 9, (6, 4000)) / 8
    theirs = MemUpdate()(x)
    fired = []
    for threshold in (0.5, SAME_NEXT):
        node = neuron.LIFNode(tau=4 / 3, decay_input=False, v_threshold=threshold, step_mode="m")
        fired.append(node(x))
    assert not torch.equal(fired[0], theirs)
    assert torch.equal(fired[1], theirs)
    assert torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item() == SAME_NEXT


class PSNNet(sew_resnet.SEWResNet):
    """The PSN authors' net without its offset: torchvision's names, an average pool in the stem."""

    def forward(self, x):
        x = self.sn1(self.bn1(self.conv1(functional.repeat_over_time(x, T))))
        x = nn.functional.avg_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])
        return self._head(self.layer4(self.layer3(self.layer2(self.layer1(x))))).mean(0)


def test_the_psn_authors_keys_fit_the_neuron_to_come(x):
    """SpikingJelly's PSN stands in for scalesnn's, whose parameters will have the same names and shapes."""
    peer = pytest.importorskip("spikingjelly.activation_based.neuron")
    torch.manual_seed(1)
    layers, block = (1, 1, 1, 1), sew_resnet.BasicBlock
    theirs = randomise(PSNNet(block, layers, CLASSES, spiking_neuron=lambda **_: OldPSN(T), step_mode="m"))
    published = rename(theirs.state_dict(), "psn")
    assert (published.kind, published.family, published.neurons) == ("psn", "sew", "PSN")
    assert published.tensors["layer2.0.downsample_sn.bias"].shape == (T, 1)
    ours = sew_resnet.SEWResNet(block, layers, CLASSES, spiking_neuron=lambda: peer.PSN(T), stem_pool="avg")
    assert_same_logits(ours, theirs, x, published.tensors)


def test_psn_weights_are_refused_by_name(tmp_path, capsys):
    net = sew_resnet.sew_resnet18(num_classes=CLASSES, spiking_neuron=lambda: OldPSN(4))
    torch.save({"model": {**net.state_dict(), "pe": torch.zeros(4, 1, 1, 1, 1)}}, tmp_path / "psn.pth")
    words = [
        "import",
        str(tmp_path / "psn.pth"),
        "-o",
        str(tmp_path / "o.safetensors"),
        "--model",
        "sew_resnet18",
    ]
    assert command(words) == 2
    said = capsys.readouterr().err
    assert (
        "holds PSN neurons (T = 4), and a learned offset of the images, pe, which scalesnn does not" in said
    )
    assert len(said.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["psn.pth"]


def test_spikingjelly_s_sew_net_with_plif(x, tmp_path, capsys):
    peer = pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based.model import sew_resnet as peers

    torch.manual_seed(1)
    theirs = peers.sew_resnet18(spiking_neuron=peer.neuron.ParametricLIFNode, cnf="ADD", num_classes=CLASSES)
    peer.functional.set_step_mode(theirs, "m")
    torch.save(randomise(theirs).state_dict(), tmp_path / "net.pth")
    output = tmp_path / "net.safetensors"
    words = [
        "import",
        str(tmp_path / "net.pth"),
        "-o",
        str(output),
        "--model",
        "sew_resnet18",
        "--from",
        "spikingjelly",
    ]
    assert command(words) == 0
    assert "recognised as weights of SpikingJelly" in capsys.readouterr().out
    assert settings_in(output)["neuron"] == "PLIF"
    ours = sew_resnet.sew_resnet18(num_classes=CLASSES, spiking_neuron=neuron.ParametricLIFNode)
    assert_same_logits(
        ours, lambda x: theirs(x.unsqueeze(0).repeat(T, 1, 1, 1, 1)).mean(0), x, load_file(output)
    )


def test_spikingjelly_s_ms_net(x):
    peers = pytest.importorskip("spikingjelly.activation_based.model.ms_resnet")
    torch.manual_seed(1)
    theirs = randomise(peers.ms_resnet18(T=T, num_classes=CLASSES))
    state = theirs.state_dict()
    assert recognise(state) == "spikingjelly"
    published = rename(state, "spikingjelly")
    assert published.family == "ms"
    assert_same_logits(ms_resnet.ms_resnet18(num_classes=CLASSES), theirs, x, published.tensors)


def test_plif_neurons_of_old_containers_keep_their_parameter():
    keys = ["sn1.w", "layer2.0.sn2.w", "layer2.0.downsample.0.module.0.weight", "layer2.0.downsample.1.w"]
    published = rename({key: torch.ones(()) for key in keys}, "sew")
    assert published.neurons == "PLIF"
    new = ["sn1.w", "layer2.0.sn2.w", "layer2.0.downsample.0.weight", "layer2.0.downsample_sn.w"]
    assert list(published.tensors) == new


def test_old_if_neurons_are_ours():
    x = torch.rand(9, 50) * 1.5
    assert torch.equal(neuron.IFNode(step_mode="m")(x), OldIF()(x))


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (
            {"a": torch.ones(1), "b": torch.ones(1)},
            [],
            "the keys (a, b, …) are those of none of sew, ms, psn, ",
        ),
        ({"a": torch.ones(1)}, ["--from", "sew"], "it lacks the first convolution or the classifier"),
        (
            {
                "layer1.0.conv1.module.0.weight": torch.ones(1),
                "conv1.weight": torch.ones(1, 1, 1, 1),
                "fc.weight": 3,
            },
            [],
            "it lacks the first convolution or the classifier",
        ),
        (
            {
                "layer1.0.conv1.weight": torch.ones(1),
                "conv1.weight": torch.ones(()),
                "fc.weight": torch.ones(()),
            },
            [],
            "it lacks the first convolution or the classifier",
        ),
        ({"layer1.0.downsample_sn.fc.weight": torch.ones(4, 4)}, [], "holds PSN neurons (T = 4)"),
        ({"model": Container()}, [], "holds pickled code"),
        ({"a": torch.ones(1)}, ["--model", "sew_resnet19"], "did you mean 'sew_resnet18'?"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, capsys, content, words, said):
    torch.save(content, tmp_path / "net.pth")
    line = [
        "import",
        tmp_path / "net.pth",
        "-o",
        tmp_path / "o.safetensors",
        "--model",
        "sew_resnet18",
        *words,
    ]
    assert command(list(map(str, line))) == 2
    text = capsys.readouterr().err
    assert said in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "o.safetensors").exists()


def test_an_output_that_cannot_be_written_and_a_file_that_is_not_there(tmp_path, capsys):
    net = spiking_resnet.spiking_resnet18(num_classes=CLASSES)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    (tmp_path / "file").touch()
    for file, output, said in (
        ("net.pth", "file/o.safetensors", "cannot be written"),
        ("nowhere.pth", "o.safetensors", "nowhere.pth: cannot be read (No such file or directory)"),
    ):
        line = ["import", tmp_path / file, "-o", tmp_path / output, "--model", "spiking_resnet18"]
        assert command(list(map(str, line))) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("make", [spiking_resnet.spiking_resnet18, sew_resnet.sew_resnet18])
def test_stem_pool(make):
    assert isinstance(make(stem_pool="avg").maxpool, layer.AvgPool2d)
    assert isinstance(make().maxpool, layer.MaxPool2d)
    with pytest.raises(Exception, match="stem_pool must be one of max, avg, got 'mean'"):
        make(stem_pool="mean")
