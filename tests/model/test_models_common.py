"""What every model promises to the rest of the house: module calls, memory formats, copies, fake tensors."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet

MODELS = {
    "spiking": spiking_resnet.spiking_resnet18,
    "spiking with bottlenecks": spiking_resnet.spiking_resnet50,
    "sew": sew_resnet.sew_resnet18,
    "sew with bottlenecks": sew_resnet.sew_resnet50,
    "ms": ms_resnet.ms_resnet18,
    "ms deep": lambda **kwargs: ms_resnet.ms_resnet104(layers=(1, 1, 1, 1), **kwargs),
}


def build(name: str, spiking_neuron=neuron.LIFNode, **kwargs) -> nn.Module:
    kwargs = {"num_classes": 10, "step_mode": "m", "v_threshold": 0.5, "detach_reset": True, **kwargs}
    net = MODELS[name](spiking_neuron=spiking_neuron, surrogate_function=surrogate.ATan(), **kwargs)
    for module in net.modules():
        if isinstance(module, layer.BatchNorm2d):
            module.running_var.fill_(0.05)  # untrained statistics would leave the net silent in evaluation
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_module_with_parameters_is_called(name, training):
    """ZeRO-3 and FSDP2 gather parameters in the hooks of module calls; PLIF neurons have one too."""
    net = build(name, neuron.ParametricLIFNode).train(training)
    entered = set()
    owners = {key: module for key, module in net.named_modules() if list(module.parameters(recurse=False))}
    for key, module in owners.items():
        module.register_forward_pre_hook(lambda module, inputs, key=key: entered.add(key))
    net(torch.randn(2, 2, 3, 32, 32))
    assert entered == set(owners)
    assert any(isinstance(module, neuron.ParametricLIFNode) for module in owners.values())


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_same_and_stays(name):
    torch.manual_seed(0)
    net = build(name, backend="torch").double()
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)
    formats = []
    for module in twin.modules():
        if isinstance(module, layer.Conv2d):
            module.register_forward_pre_hook(
                lambda module, inputs: formats.append(
                    inputs[0].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
                )
            )
    x = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    y = net(x.unflatten(0, (2, 2)))
    y_last = twin(x.to(memory_format=torch.channels_last).unflatten(0, (2, 2)))
    torch.testing.assert_close(y_last, y)
    assert formats
    assert all(formats)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_after_a_step_starts_fresh(name):
    """As for an exponential moving average of the weights."""
    torch.manual_seed(0)
    net = build(name).eval()
    x_seq = torch.randn(2, 2, 3, 32, 32)
    first = net(x_seq)
    assert first.std((0, 1)).max() > 0
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x_seq), first)


@pytest.mark.parametrize("name", MODELS)
def test_runs_on_fake_tensors(name):
    """Memory at ImageNet's size is counted without allocating any."""
    with FakeTensorMode():
        net = build(name, num_classes=1000, backend="torch")
        y = net(functional.repeat_over_time(torch.randn(32, 3, 224, 224), 8))
        y.sum().backward()
    assert y.shape == (8, 32, 1000)


@pytest.mark.parametrize("name", MODELS)
def test_logits_for_an_image_do_not_depend_on_its_neighbours_in_evaluation(name):
    torch.manual_seed(0)
    net = build(name).double().eval()
    x_seq = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    together = net(x_seq)
    assert together.std((0, 1)).max() > 0
    functional.reset_net(net)
    torch.testing.assert_close(net(x_seq[:, 1:2]), together[:, 1:2])
