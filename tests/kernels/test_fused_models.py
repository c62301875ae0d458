"""Whole nets, fused and in plain torch: losses, gradients, running statistics, bytes kept, torch.compile."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.kernels import unit
from scalesnn.model import sew_resnet, spiking_resnet


def plain(model: nn.Module) -> nn.Module:
    """A copy of the net that runs in plain torch throughout."""
    model = copy.deepcopy(model)
    functional.set_backend(model, "torch")
    return model


def net(width: int = 8, cls: type = neuron.LIFNode, **kwargs: object) -> nn.Module:
    """A small residual net: stem, max-pool, a block with a shortcut of its own."""

    def make() -> nn.Module:
        return cls(surrogate_function=surrogate.ATan(), **kwargs)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.sn1 = (
                layer.Conv2d(3, width, 3, padding=1),
                layer.BatchNorm2d(width),
                make(),
            )
            self.pool = layer.MaxPool2d(2)
            self.conv2, self.bn2, self.sn2 = (
                layer.Conv2d(width, width, 3, padding=1),
                layer.BatchNorm2d(width),
                make(),
            )
            self.conv3, self.bn3, self.sn3 = (
                layer.Conv2d(width, width, 3, padding=1),
                layer.BatchNorm2d(width),
                make(),
            )
            self.side, self.side_bn, self.sn4 = (
                layer.Conv2d(width, width, 1),
                layer.BatchNorm2d(width),
                make(),
            )
            self.fc = layer.Linear(width, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.bn1(self.conv1(x), neuron=self.sn1))
            x = self.bn2(self.conv2(x), neuron=self.sn2, residual=x)
            x = self.bn3(self.conv3(x), neuron=self.sn3, residual=self.side_bn(self.side(x)))
            return self.fc(x.mean((-1, -2)))

    model = Net()
    functional.set_step_mode(model, "m")
    return model


def losses(model: nn.Module, steps: int, static: bool, dtype: torch.dtype = torch.float64) -> list[float]:
    """The loss of every step of a short training."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trace = []
    for _ in range(steps):
        images = torch.randn(4, 3, 3, 10, 10, generator=generator, dtype=dtype)
        x = functional.repeat_over_time(images[0], 4) if static else images
        targets = torch.randint(0, 5, (3,), generator=generator)
        functional.reset_net(model)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).mean(0), targets)
        loss.backward()
        optimizer.step()
        trace.append(loss.item())
    return trace


@pytest.mark.parametrize("cls", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode])
@pytest.mark.parametrize("static", [False, True])
def test_fifty_steps_have_the_same_losses_fused_and_not(cls: type, static: bool) -> None:
    torch.manual_seed(0)
    fused = net(cls=cls).double()
    reference = plain(fused)
    ours, theirs = losses(fused, 50, static), losses(reference, 50, static)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-9
    assert ours[-1] != ours[0]
    for (name, one), other in zip(fused.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("make", [spiking_resnet.spiking_resnet18, sew_resnet.sew_resnet18])
def test_resnet_gradients_and_running_statistics(make: object) -> None:
    torch.manual_seed(0)
    fused = make(  # type: ignore[operator]
        num_classes=7, spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), step_mode="m"
    ).double()
    reference = plain(fused)
    x = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    for model in (fused, reference):
        model(x).square().sum().backward()
    for (name, one), other in zip(fused.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, one), other in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)
    with torch.no_grad():
        functional.reset_net(fused), functional.reset_net(reference)
        assert torch.allclose(fused.eval()(x), reference.eval()(x), atol=1e-9)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_batch_norm_options(options: dict[str, object]) -> None:
    fused, reference = (
        layer.BatchNorm2d(5, step_mode="m", **options),
        layer.BatchNorm2d(5, step_mode="m", **options),
    )
    reference.backend = "torch"
    for _ in range(3):
        x = torch.randn(4, 2, 5, 6, 6) * 3 + 2
        nodes = [neuron.IFNode(step_mode="m", backend=b) for b in ("auto", "torch")]
        assert (fused(x, neuron=nodes[0]) != reference(x, neuron=nodes[1])).double().mean() < 1e-3
    for one, other in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_state_goes_on_from_chunk_to_chunk() -> None:
    node, whole = (neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan()) for _ in range(2))
    x = torch.randn(8, 2, 30, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    chunks = torch.cat([node(part) for part in a.split(3)])
    expected = whole(b)
    assert torch.equal(chunks, expected)
    (chunks.cumsum(0).square().sum() + node.v.sum()).backward()
    (expected.cumsum(0).square().sum() + whole.v.sum()).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_torch_compile_has_no_graph_break(backend: str) -> None:
    torch.manual_seed(0)
    model = net()
    reference = copy.deepcopy(model)
    x = torch.randn(4, 3, 3, 10, 10)
    expected = reference(x)
    expected.sum().backward()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    actual = compiled(x)
    actual.sum().backward()
    assert torch.allclose(actual, expected, atol=1e-5)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def saved(model: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that autograd keeps, but parameters."""
    sizes: dict[int, int] = {}
    alive = []
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers(), x]}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(sizes.values())


@pytest.mark.parametrize(("static", "most"), [(True, 3.7), (False, 4.7)])
def test_bytes_kept_per_neuron_step(static: bool, most: float) -> None:
    """Over the whole spiking_resnet18 at 224 x 224: the figure of benchmarks/saved_bytes.py."""
    neurons = 2_308_096  # of one image
    with FakeTensorMode():
        model = spiking_resnet.spiking_resnet18(
            spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), step_mode="m"
        )
        x = torch.empty(4, 8, 3, 224, 224)
        x = x[0].expand(4, 8, 3, 224, 224) if static else x
        assert saved(model, x) / (neurons * 32) <= most


def test_cupy_on_the_cpu_is_one_clear_error() -> None:
    node = neuron.IFNode(step_mode="m", backend="cupy")
    with pytest.raises(UserError, match=r"backend 'cupy' needs CUDA tensors.*'auto'"):
        node(torch.randn(2, 3))


def test_the_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    unit.log_backend.cache_clear()
    caplog.set_level(logging.INFO, "scalesnn")
    node = neuron.IFNode(step_mode="m")
    for _ in range(3):
        node(torch.randn(2, 3))
    assert [record.message.split(":")[0] for record in caplog.records] == ["neurons on cpu"]


def test_a_hook_on_the_neuron_sees_its_input() -> None:
    model = net()
    seen = []
    model.sn1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(4, 3, 3, 10, 10)
    y = plain(model)(x)
    seen.clear()
    torch.testing.assert_close(model(x), y)
    assert seen[0].mean().abs() < 1e-5, "normalised, not the convolution's output"


def test_a_neuron_with_a_charge_of_its_own_runs_in_plain_torch() -> None:
    class Doubled(neuron.IFNode):
        def neuronal_charge(self, x: Tensor) -> None:
            self.v = self.v + 2 * x

    x = torch.full((1, 2), 0.6)
    assert Doubled(step_mode="m")(x).sum() == 2
    assert neuron.IFNode(step_mode="m")(x).sum() == 0
