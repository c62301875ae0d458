"""MS ResNets against SpikingJelly on renamed weights, and what the paper says of them."""

import re

import pytest
import torch
from spikingjelly.activation_based import functional as peer_functional
from spikingjelly.activation_based import surrogate as peer_surrogate
from spikingjelly.activation_based.model import ms_resnet as peer

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.model import ms_resnet
from scalesnn.model.train_imagenet_example import SResNetTrainer, build_model

PEERS_NAMES = [(r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1."), (r"^fc\.", "head.")]


def to_peers_names(state):
    """Our keys to SpikingJelly's."""
    renamed = {}
    for key, value in state.items():
        for ours, theirs in PEERS_NAMES:
            key = re.sub(ours, theirs, key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", ["ms_resnet18", "ms_resnet34"])
def test_outputs_and_gradients_equal_the_peers(name):
    torch.manual_seed(2)
    x_seq = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    ours = getattr(ms_resnet, name)(num_classes=10, step_mode="m").double()
    for key, parameter in ours.named_parameters():
        if key.endswith("bn2.weight"):  # 0 at the start: no gradient would reach the branch
            torch.nn.init.constant_(parameter, 0.5)
    theirs = getattr(peer, name)(num_classes=10, surrogate_function=peer_surrogate.Rect(alpha=1.0)).double()
    # With a surrogate given, SpikingJelly keeps the rest of the paper's values.
    theirs.load_state_dict(to_peers_names(ours.state_dict()))
    peer_functional.set_step_mode(theirs, "m")
    y, expected = ours(x_seq).mean(0), theirs(x_seq)
    assert y.std(-2).max() > 0
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    expected.square().sum().backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    for key, grad in to_peers_names({key: p.grad for key, p in ours.named_parameters()}).items():
        torch.testing.assert_close(grad, grads[key], rtol=1e-9, atol=1e-10 * grad.abs().max().item(), msg=key)


def test_the_neuron_is_the_papers():
    """The potential keeps a quarter per step, fires at 0.5, resets to 0; a box of height 1 and width 1."""
    node = ms_resnet.ms_resnet18(step_mode="m").sn
    torch.testing.assert_close(
        node(torch.tensor([[0.4], [0.4], [0.0]])).flatten(), torch.tensor([0.0, 1.0, 0.0])
    )
    torch.testing.assert_close(node.v, torch.tensor([0.0]))
    x = torch.tensor([-0.51, -0.49, 0.49, 0.51])
    assert node.surrogate_function.derivative(x).tolist() == [0, 1, 1, 0]


def test_a_new_block_is_the_identity():
    """The last BatchNorm of a branch starts at 0."""
    block = ms_resnet.ms_resnet18(step_mode="m").layer2[1]
    x_seq = torch.randn(2, 2, 128, 5, 5)
    assert torch.equal(block(x_seq), x_seq)


def test_batch_norms_start_at_the_threshold():
    net = ms_resnet.ms_resnet18()
    assert net.bn1.weight.unique().item() == 0.5
    assert net.layer1[0].downsample[-1].weight.unique().item() == 0.5
    assert net.layer3[1].bn2.weight.unique().item() == 0


def test_every_convolution_but_the_stem_takes_spikes():
    net = ms_resnet.ms_resnet18(num_classes=10, step_mode="m")
    seen = []
    for name, module in net.named_modules():
        if isinstance(module, layer.Conv2d) and name != "conv1" and "downsample" not in name:
            module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].unique().tolist()))
    net(torch.randn(2, 2, 3, 64, 64))
    assert len(seen) == 16
    assert all(set(values) <= {0.0, 1.0} for values in seen)


def test_the_deep_net_has_104_layers_and_its_own_stem():
    with torch.device("meta"):
        net = ms_resnet.ms_resnet104()
    assert sum(len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)) * 2 + 2 == 104
    assert [tuple(conv.kernel_size) for conv in net.conv1] == [(3, 3)] * 3
    assert isinstance(net.layer1[0].downsample[0], layer.AvgPool2d)
    assert net.dropout.p == 0.2


def test_the_deep_net_trains():
    net = ms_resnet.ms_resnet104(layers=(1, 1, 1, 1), num_classes=4, step_mode="m")
    net(torch.randn(2, 2, 3, 64, 64)).sum().backward()
    assert net.conv1[0].weight.grad.abs().max() > 0


def test_another_neuron_takes_its_own_arguments_only():
    net = ms_resnet.ms_resnet18(
        spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), num_classes=3
    )
    assert isinstance(net.sn, neuron.IFNode)
    assert net.sn.v_threshold == 1.0
    assert net.fc.out_features == 3


def test_step_modes_agree_in_evaluation():
    torch.manual_seed(0)
    net = ms_resnet.ms_resnet18(num_classes=10, v_threshold=0.1).double().eval()
    for module in net.modules():
        if isinstance(module, layer.BatchNorm2d):
            module.running_var.fill_(0.05)  # untrained statistics would leave the net silent
    x_seq = torch.randn(3, 2, 3, 64, 64, dtype=torch.float64)
    steps = torch.stack([net(x) for x in x_seq])
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert steps.std((0, 1)).max() > 0
    torch.testing.assert_close(net(x_seq), steps)


def test_there_are_no_pretrained_weights():
    with pytest.raises(UserError, match="no pretrained weights for ms_resnet34"):
        ms_resnet.ms_resnet34(pretrained=True)


@pytest.mark.parametrize(
    ("words", "kind", "threshold", "shape"),
    [
        ([], "LIFNode", 0.5, "Rect"),
        (["--surrogate", "ATan"], "LIFNode", 0.5, "ATan"),
        (["--neuron", "IF"], "IFNode", 1.0, "ATan"),
    ],
)
def test_the_command_line_takes_the_papers_neuron_unless_one_is_given(words, kind, threshold, shape):
    args = SResNetTrainer().get_args_parser().parse_args(["--model", "ms_resnet18", *words])
    node = build_model(args, 10).layer1[0].sn1
    assert type(node).__name__ == kind
    assert node.v_threshold == threshold
    assert type(node.surrogate_function).__name__ == shape


@pytest.mark.parametrize("words", [["--stem-pool", "avg"], ["--zero-init-residual"]])
def test_flags_of_other_nets_are_refused(words):
    args = SResNetTrainer().get_args_parser().parse_args(["--model", "ms_resnet18", *words])
    with pytest.raises(
        UserError, match=f"{words[0]} is for spiking and SEW nets, but --model is ms_resnet18"
    ):
        build_model(args, 10)
