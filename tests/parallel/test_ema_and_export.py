"""Averaged weights against torch's own averaging, and exports against torchvision and SpikingJelly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scalesnn import neuron, surrogate
from scalesnn.base import UserError
from scalesnn.cli import main as command
from scalesnn.model.spiking_resnet import spiking_resnet18
from scalesnn.parallel import Topology
from scalesnn.parallel.single import SingleStrategy
from scalesnn.training.checkpoint import CheckpointManager, Progress
from scalesnn.training.ema import ModelEma, adjusted_decay


class Flags:
    """What a strategy reads of the command line."""

    gradient_accumulation = 1
    clip_grad_norm = None
    sync_bn = False
    on_nan = "stop"


def prepared(net: nn.Module) -> SingleStrategy:
    strategy = SingleStrategy(Flags(), Topology())
    strategy.setup_device("cpu")
    strategy.prepare(net, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), lambda o: None)
    return strategy


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))


def step(strategy: SingleStrategy, seed: int) -> None:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    strategy.backward(strategy.model(x).square().mean())
    strategy.step()


@pytest.mark.parametrize("steps", [1, 3])
def test_average_is_that_of_torch(steps: int) -> None:
    net = small_net()
    strategy = prepared(net)
    ema = ModelEma(strategy, 0.7, steps)
    reference = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    for number in range(1, 13):
        step(strategy, number)
        ema.update(number)
        if number % steps == 0:
            reference.update_parameters(net)
    expected = {n: v for n, v in reference.module.state_dict().items() if v.is_floating_point()}
    before = copy.deepcopy(net.state_dict())
    with ema.applied():
        found = copy.deepcopy(net.state_dict())
    assert len(expected) == 8
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-8), name
        assert not torch.equal(found[name], before[name]), name
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the network's own weights changed"


def test_average_starts_anew_until_warm_up_is_over() -> None:
    net = small_net()
    strategy = prepared(net)
    ema = ModelEma(strategy, 0.5)
    for number in range(1, 5):
        step(strategy, number)
        ema.update(number, warming_up=number < 4)
    with ema.applied():
        averaged = net[0].weight.detach().clone()
    assert torch.equal(averaged, net[0].weight), "the first update after warm-up copies"
    step(strategy, 9)
    ema.update(5)
    expected = torch.lerp(averaged, net[0].weight.detach(), 0.5)
    with ema.applied():
        assert torch.allclose(net[0].weight, expected)


@pytest.mark.parametrize(
    ("decay", "batch", "steps", "epochs", "expected"),
    [(0.99998, 1024, 32, 600, 1 - 2e-5 * 1024 * 32 / 600), (0.5, 4096, 32, 1, 0.0), (1.0, 8, 1, 1, 1.0)],
)
def test_decay_is_adjusted_as_in_torchvision(
    decay: float, batch: int, steps: int, epochs: int, expected: float
) -> None:
    assert adjusted_decay(decay, global_batch=batch, steps=steps, epochs=epochs) == pytest.approx(expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A run's folder with a checkpoint of spiking_resnet18; its weights, and its averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    net = spiking_resnet18(spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan())
    strategy = prepared(net)
    ema = ModelEma(strategy, 0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.25)
    ema.updates = 1
    ema.update(1)
    CheckpointManager(folder / "checkpoints", strategy, ema=ema).save(Progress(step=7))
    with ema.applied():
        averaged = copy.deepcopy(net.state_dict())
    return folder, copy.deepcopy(net.state_dict()), averaged


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/latest", "checkpoints/step_00000007"])
def test_export_loads_into_torchvision(run: Any, tmp_path: Path, where: str) -> None:
    folder, weights, _ = run
    output = tmp_path / "model.safetensors"
    assert command(["export", str(folder / where), "-o", str(output)]) == 0
    found = load_file(output)
    torchvision.models.resnet18().load_state_dict(found, strict=True)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_export_of_the_average_loads_into_spikingjelly(run: Any, tmp_path: Path) -> None:
    peer = pytest.importorskip("spikingjelly.activation_based.model.spiking_resnet")
    from spikingjelly.activation_based import neuron as peer_neuron

    folder, weights, averaged = run
    output = tmp_path / "model.pt"
    assert command(["export", str(folder), "-o", str(output), "--ema"]) == 0
    found = torch.load(output, weights_only=True)
    peer.spiking_resnet18(spiking_neuron=peer_neuron.IFNode).load_state_dict(found, strict=True)
    assert all(torch.equal(found[name], value) for name, value in averaged.items())
    assert not torch.equal(found["fc.weight"], weights["fc.weight"])


def test_export_of_nothing_is_one_line(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["export", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x.pt")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("scalesnn: ")
    assert "there is no such folder" in said
    assert said.count("\n") == 1


def test_export_into_what_is_no_folder_is_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command(["export", str(run[0]), "-o", str(tmp_path / "file" / "x.pt")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_export_of_an_average_that_was_not_kept(tmp_path: Path) -> None:
    strategy = prepared(small_net())
    CheckpointManager(tmp_path / "checkpoints", strategy).save(Progress(step=1))
    from scalesnn.training.export import export

    with pytest.raises(UserError, match="its run had no --model-ema"):
        export(tmp_path, tmp_path / "x.safetensors", ema=True)
