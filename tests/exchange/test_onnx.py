"""ONNX files, run by onnxruntime: the logits of T time-steps at once, and of one step after the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trained_nets import lively

from scalesnn import functional, layer, neuron
from scalesnn.base import MemoryModule, UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from scalesnn.exchange.onnx_file import write_onnx  # noqa: E402

T, IMAGE = 3, (3, 8, 8)


class Small(nn.Module):
    """Stem, pool, a block with its shortcut, head; hard, soft and other resets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = layer.Conv2d(3, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8)
        self.sn1 = neuron.LIFNode(v_reset=-0.2)
        self.pool = layer.MaxPool2d(2)
        self.conv2, self.bn2 = layer.Conv2d(8, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8)
        self.sn2 = neuron.ParametricLIFNode(v_reset=None, decay_input=False)
        self.fc = layer.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x), neuron=self.sn1))
        x = self.bn2(self.conv2(x), neuron=self.sn2, residual=x)
        return self.fc(x.mean((-2, -1)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return lively(Small())


@torch.no_grad()
def own_logits(net: nn.Module, x_TNCHW: Tensor) -> Tensor:
    functional.set_step_mode(net, "m")
    functional.set_backend(net, "auto")
    functional.reset_net(net)
    return net(x_TNCHW)


def session(file: Path) -> object:
    onnx.checker.check_model(str(file))
    return onnxruntime.InferenceSession(str(file))


def test_time_steps_at_once_for_any_number_of_images(net: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    assert write_onnx(net, IMAGE, file, T=T, about={"classes": json.dumps(["é", "b"])}) > 20
    run = session(file)
    for count in (1, 5):
        images = 3 * torch.randn(count, *IMAGE)
        expected = own_logits(net, functional.repeat_over_time(images, T)).mean(0)
        (found,) = run.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert json.loads(run.get_modelmeta().custom_metadata_map["classes"]) == ["é", "b"]


@pytest.mark.long
def test_event_frames(net: nn.Module, tmp_path: Path) -> None:
    write_onnx(net, (T, *IMAGE), tmp_path / "net.onnx", T=T, about={})
    frames = 3 * torch.randn(4, T, *IMAGE)
    (found,) = session(tmp_path / "net.onnx").run(None, {"images": frames.numpy()})
    np.testing.assert_allclose(found, own_logits(net, frames.transpose(0, 1)).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_step_by_step_with_potentials_as_inputs_and_outputs(net: nn.Module, tmp_path: Path) -> None:
    write_onnx(net, IMAGE, tmp_path / "net.onnx", T=None, about={})
    run = session(tmp_path / "net.onnx")
    shapes = {i.name: i.shape[1:] for i in run.get_inputs()}
    assert list(shapes) == ["images", "v/sn1", "v/sn2"]
    assert [o.name for o in run.get_outputs()] == ["logits", "v_next/sn1", "v_next/sn2"]
    x = 3 * torch.randn(4, 2, *IMAGE)
    rest = {"v/sn1": -0.2, "v/sn2": 0.0}
    state = {name: np.full((2, *shapes[name]), value, np.float32) for name, value in rest.items()}
    for images, expected in zip(x, own_logits(net, x), strict=True):
        logits, *after = run.run(None, {"images": images.numpy(), **state})
        state = dict(zip(state, after, strict=True))
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


class Counter(MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_memory("total", None)

    def single_step_forward(self, x: Tensor) -> Tensor:
        self.total = x if self.total is None else self.total + x
        return self.total


def test_a_state_that_is_not_a_potential_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 \(Counter\) keeps a state"):
        write_onnx(nn.Sequential(Counter()), IMAGE, tmp_path / "net.onnx", T=None, about={})


class Unsayable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_what_the_exporter_cannot_translate_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--format onnx: .*bessel_j0"):
        write_onnx(nn.Sequential(Unsayable()), IMAGE, tmp_path / "net.onnx", T=2, about={})
