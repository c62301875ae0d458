"""Spiking health equals a slow reference that keeps every spike tensor whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.model import sew_resnet, spiking_resnet
from scalesnn.tracking import SpikeMonitor
from scalesnn.tracking.energy import fan_out
from scalesnn.tracking.spikes import active_window

T, N = 3, 2


def spiking_resnet18() -> nn.Module:
    return spiking_resnet.spiking_resnet18(
        num_classes=10, spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), detach_reset=True
    )


def sew_resnet18() -> nn.Module:
    return sew_resnet.sew_resnet18(
        num_classes=10,
        cnf="ADD",
        spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.Sigmoid(),
        v_reset=None,
    )


def grouped_net() -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(3, 8, 3, bias=False),
        neuron.IFNode(surrogate_function=surrogate.ATan()),
        layer.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=4),
        neuron.LIFNode(v_threshold=0.3, v_reset=-0.2, surrogate_function=surrogate.Rect()),
        layer.Conv2d(12, 6, 3, padding="same"),
        neuron.ParametricLIFNode(v_threshold=0.2, v_reset=None),
        layer.Flatten(),
        layer.Linear(6 * 16 * 28, 10),
    )


class Recorder:
    """Every spike tensor, membrane and layer input of one forward pass, by plain forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.spikes: dict[str, Tensor] = {}
        self.charges: dict[str, Tensor] = {}
        self.inputs: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, neuron.BaseNode):
                module.store_v_seq = True
                module.register_forward_hook(self._spikes(name))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(self._inputs(name))

    def _spikes(self, name: str):
        def hook(module, inputs, output):
            self.spikes[name] = output.detach().double()

        return hook

    def _inputs(self, name: str):
        def hook(module, inputs, output):
            self.inputs[name] = (module, inputs[0].detach().double(), output.detach())

        return hook


def norms_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.norm() for name, p in model.named_parameters() if p.dim() > 1}


@pytest.fixture(params=[spiking_resnet18, sew_resnet18, grouped_net], ids=lambda make: make.__name__)
def measured(request: pytest.FixtureRequest) -> tuple[nn.Module, dict, Recorder]:
    torch.manual_seed(0)
    model = request.param()
    functional.set_step_mode(model, "m")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # some channels never fire, some always
                module.weight.uniform_(0.5, 2)
                module.bias[::5] = -50
                module.bias[1::7] = 50
    x = torch.rand(T, N, 3, 32, 32)
    monitor, recorder = SpikeMonitor(model, every=4), Recorder(model)
    with monitor.watch(4):
        model(x).square().sum().backward()
    monitor.take_gradients(4, lambda: norms_of(model))
    return model, monitor.read(), recorder


def test_firing_rates_and_dead_and_saturated_channels_equal_the_reference(measured) -> None:
    _, record, recorder = measured
    assert recorder.spikes
    dead = []
    for name, spikes in recorder.spikes.items():
        spikes_TNCx = spikes.flatten(3) if spikes.dim() > 3 else spikes.unsqueeze(-1)
        channels = spikes_TNCx.permute(2, 0, 1, 3).flatten(1)
        assert record[f"spikes/{name}/firing_rate"] == pytest.approx(spikes.mean().item(), rel=1e-12)
        assert record[f"spikes/{name}/firing_rate_t"] == pytest.approx(
            [step.mean().item() for step in spikes], rel=1e-12
        )
        dead.append((channels.amax(1) == 0).double().mean().item())
        assert record[f"spikes/{name}/dead_share"] == dead[-1]
        assert record[f"spikes/{name}/saturated_share"] == (channels.amin(1) == 1).double().mean().item()
    fired = sum(spikes.sum().item() for spikes in recorder.spikes.values())
    neurons = sum(spikes.numel() for spikes in recorder.spikes.values())
    assert record["spikes/firing_rate"] == pytest.approx(fired / neurons, rel=1e-12)
    assert record["spikes/dead_share"] == pytest.approx(sum(dead) / len(dead), rel=1e-12)


def test_reference_nets_have_dead_and_saturated_channels(measured) -> None:
    model, record, _ = measured
    if not isinstance(model, nn.Sequential):
        assert record["spikes/dead_share"] > 0.1
        assert record["spikes/saturated_share"] > 0.05


def test_synaptic_operations_and_energy_equal_the_reference(measured) -> None:
    _, record, recorder = measured
    synops = macs = ann = 0.0
    for module, x, y in recorder.inputs.values():
        ones, x = torch.ones_like(module.weight).double(), x.flatten(0, 1)
        per_output = ones[0].numel()
        if isinstance(module, nn.Conv2d):
            arriving = F.conv2d(x, ones, None, module.stride, module.padding, module.dilation, module.groups)
        else:
            arriving = F.linear(x, ones)
        if torch.equal(x, x.round()) and x.min() >= 0:
            synops += arriving.sum().item()
        else:
            macs += y.numel() * per_output
        ann += y[0].numel() * per_output
    assert synops > 0
    assert macs > 0
    assert record["energy/synops_per_image"] == pytest.approx(synops / N, rel=1e-12)
    assert record["energy/macs_per_image"] == pytest.approx(macs / N, rel=1e-12)
    assert record["energy/ann_mj_per_image"] == pytest.approx(ann / N * 4.6e-9, rel=1e-12)
    assert record["energy/snn_mj_per_image"] == pytest.approx(
        (synops * 0.9 + macs * 4.6) / N * 1e-9, rel=1e-12
    )
    assert record["energy/ann_over_snn"] == pytest.approx(ann * 4.6 / (synops * 0.9 + macs * 4.6), rel=1e-12)


def test_membrane_statistics_equal_the_reference(measured) -> None:
    model, record, recorder = measured
    for name, spikes in recorder.spikes.items():
        node = model.get_submodule(name)
        v = node.v_seq[-1].detach().double()
        assert record[f"membrane/{name}/mean"] == pytest.approx(v.mean().item(), abs=1e-5)
        assert record[f"membrane/{name}/std"] == pytest.approx(v.std(correction=0).item(), rel=1e-4)
        last = spikes[-1]
        if node.v_reset is None:
            distance = v + node.v_threshold * last - node.v_threshold
        else:
            distance = v[last == 0] - node.v_threshold
        slope = node.surrogate_function.derivative(distance)
        peak = node.surrogate_function.derivative(torch.zeros((), dtype=torch.float64))
        share = (slope >= 0.1 * peak).double().mean().item()
        assert record[f"membrane/{name}/active_share"] == pytest.approx(share, abs=2 / distance.numel())


def test_gradient_norms_equal_the_reference(measured) -> None:
    model, record, recorder = measured
    for name in recorder.inputs:
        expected = model.get_submodule(name).weight.grad.double().norm().item()
        assert record[f"gradient_norm/{name}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("looks", [True, False])
def test_gradients_of_other_steps_are_left_alone_and_other_ranks_take_part(looks: bool) -> None:
    model = nn.Sequential(layer.Conv2d(3, 4, 3), neuron.IFNode(v_threshold=0.1))
    functional.set_step_mode(model, "m")
    monitor = SpikeMonitor(model, every=2, looks=looks)
    asked = 0

    def norms() -> dict[str, Tensor]:
        nonlocal asked
        asked += 1
        return {"0.weight": torch.ones(())}

    for step in range(1, 5):
        with monitor.watch(step):
            assert (model[1].observer is not None) == (looks and step != 3)
            model(torch.rand(T, N, 3, 8, 8))
        functional.reset_net(model)
        monitor.take_gradients(step, norms)
        assert ("gradient_norm/0" in monitor.read()) == (looks and step != 3)
    assert asked == 3


def test_a_pass_that_breaks_off_is_measured_again() -> None:
    model = nn.Sequential(layer.Conv2d(3, 4, 3), neuron.IFNode(v_threshold=0.1))
    functional.set_step_mode(model, "m")
    monitor = SpikeMonitor(model, every=100)
    with pytest.raises(MemoryError), monitor.watch(1):  # noqa: PT012
        model(torch.rand(T, N, 3, 8, 8))
        raise MemoryError
    functional.reset_net(model)
    with monitor.watch(1):
        model(torch.rand(T, N, 3, 8, 8))
    record = monitor.read()
    assert len(record["spikes/1/firing_rate_t"]) == T
    assert record["energy/macs_per_image"] == 4 * 6 * 6 * 27 * T


@pytest.mark.parametrize("repeated", [False, True])
def test_an_image_repeated_over_time_is_computed_once(repeated: bool) -> None:
    model = nn.Sequential(layer.Conv2d(3, 4, 3), neuron.IFNode())
    functional.set_step_mode(model, "m")
    x = torch.rand(N, 3, 8, 8).expand(T, N, 3, 8, 8)
    monitor = SpikeMonitor(model, every=1)
    with monitor.watch(1):
        model(x if repeated else x.contiguous())
    once = 4 * 6 * 6 * 27
    record = monitor.read()
    assert record["energy/macs_per_image"] == once * (1 if repeated else T)
    assert record["energy/ann_macs_per_image"] == once
    assert monitor.training_flops_per_image == 6 * once * (1 if repeated else T)


def test_chunks_of_time_and_recomputation_count_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer.Conv2d(3, 4, 3), neuron.IFNode(v_threshold=0.1), layer.Conv2d(4, 2, 3))
    functional.set_step_mode(model, "m")
    x = torch.rand(6, N, 3, 8, 8)
    whole, chunked = SpikeMonitor(model, every=1), SpikeMonitor(model, every=1)
    with whole.watch(1):
        model(x)
    functional.reset_net(model)
    with chunked.watch(1):
        for chunk in x.split(2):
            model(chunk)
    functional.reset_net(model)
    model(x)  # outside: what a recomputation in the backward pass does
    assert chunked.read() == whole.read()


def test_only_one_micro_batch_of_a_step_is_measured() -> None:
    model = nn.Sequential(layer.Conv2d(3, 4, 3), neuron.IFNode(v_threshold=0.1))
    functional.set_step_mode(model, "m")
    monitor = SpikeMonitor(model, every=1)
    for _ in range(2):
        with monitor.watch(1):
            model(torch.rand(T, N, 3, 8, 8))
        functional.reset_net(model)
    assert len(monitor.read()["spikes/1/firing_rate_t"]) == T


def test_steps_that_are_not_due_are_left_alone() -> None:
    model = nn.Sequential(layer.Conv2d(3, 4, 3), neuron.IFNode())
    functional.set_step_mode(model, "m")
    monitor = SpikeMonitor(model, every=10)
    for step in range(1, 21):
        with monitor.watch(step):
            assert (model[1].observer is not None) == (step in (1, 10, 20))
            model(torch.rand(T, N, 3, 8, 8))
        functional.reset_net(model)
        assert bool(monitor.read()) == (step in (1, 10, 20))
        assert not model[0]._forward_hooks
    off = SpikeMonitor(model, every=0)
    with off.watch(1):
        assert model[1].observer is None


def test_silent_and_stuck_channels_are_named_in_plain_words_once() -> None:
    model = nn.Sequential(layer.BatchNorm2d(8), neuron.IFNode())
    functional.set_step_mode(model, "m")
    with torch.no_grad():
        model[0].bias[:] = torch.tensor([-9.0] * 6 + [9.0] * 2)
    monitor = SpikeMonitor(model, every=250)
    found = []
    for step in range(250, 1500, 250):
        with monitor.watch(step):
            model(torch.rand(T, N, 8, 4, 4))
        functional.reset_net(model)
        monitor.read()
        found += monitor.warnings()
    assert found == ["1: 75 % of channels silent for 500 steps"]


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_fan_out_equals_the_gradient_of_a_convolution_of_ones(kernel: int, padding: object) -> None:
    stride = 1 if padding == "same" else 2
    conv = nn.Conv2d(4, 6, kernel, stride=stride, padding=padding, groups=2, bias=False).double()
    nn.init.ones_(conv.weight)
    x = torch.zeros(1, 4, 9, 10, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    y.sum().backward()
    assert torch.equal(fan_out(conv, x.shape[-2:], y.shape[-2:]), x.grad[0, 0])


def test_window_of_a_surrogate_is_where_its_gradient_is_at_least_a_tenth() -> None:
    low, high = active_window(neuron.IFNode(surrogate_function=surrogate.ATan(alpha=2.0)))
    edge = 3 / torch.pi  # 1 / (1 + (pi x)^2) = 0.1
    assert (low, high) == pytest.approx((-edge, edge), abs=1e-5)


def test_half_precision_spikes_are_counted_exactly() -> None:
    node = neuron.IFNode(v_threshold=0.5)
    node.step_mode = "m"
    monitor = SpikeMonitor(node, every=1)
    x = torch.rand(2, 64, 3, 40, 40, dtype=torch.bfloat16)  # 102,400 neurons a channel: beyond bfloat16's 256
    with monitor.watch(1):
        spikes = node(x)
    assert monitor.read()["spikes/firing_rate"] == pytest.approx(spikes.double().mean().item(), rel=1e-12)
