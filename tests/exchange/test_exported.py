"""torch.export programs with the fused ops, and the example that serves one."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import CLASSES, ROOT, environment, make_images
from torch import nn
from trained_nets import lively, save_lively

from scalesnn import functional, neuron
from scalesnn.base import UserError
from scalesnn.cli import main
from scalesnn.exchange.exported import read_program, write_program
from scalesnn.model import resnet, sew_resnet, spiking_resnet
from scalesnn.model.sew_resnet import sew_resnet18

T, IMAGE = 2, (3, 24, 24)


def spiking() -> nn.Module:
    return spiking_resnet.SpikingResNet(resnet.BasicBlock, (1, 1, 1, 1), 5, v_reset=None)


def sew() -> nn.Module:
    return sew_resnet.SEWResNet(
        sew_resnet.BasicBlock, (1, 1, 1, 1), 5, spiking_neuron=neuron.ParametricLIFNode
    )


@pytest.mark.parametrize("make", [pytest.param(spiking, marks=pytest.mark.long), sew])
def test_a_program_runs_the_fused_ops_on_any_number_of_images(make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lively(make())
    functional.set_step_mode(net, "m")
    assert write_program(net, IMAGE, tmp_path / "net.pt2", T=T, about={"classes": ["é"]}) > 50
    program, about = read_program(tmp_path / "net.pt2")
    assert about == {"classes": ["é"]}
    assert "scalesnn.unit" in program.code
    for count in (1, 3):
        images = 2 * torch.rand(count, *IMAGE)
        functional.reset_net(net)
        with torch.no_grad():
            expected = net(functional.repeat_over_time(images, T)).mean(0)
        assert torch.equal(program(images), expected)
        assert torch.equal(program(images), expected), "the second call begins at rest, too"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x80\x04\x95"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    file.write_bytes(content)
    with pytest.raises(UserError, match="not an exported program"):
        read_program(file)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "net.pt2")
    with pytest.raises(UserError, match="not an exported program"):
        read_program(tmp_path / "net.pt2")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where examples/serve.py serves a net."""
    torch.manual_seed(0)
    net = lively(sew_resnet18(num_classes=4, spiking_neuron=neuron.LIFNode))
    save_lively(tmp_path / "net.safetensors", net, list(CLASSES))
    assert main(["export", str(tmp_path / "net.safetensors"), "-o", str(tmp_path / "net.pt2")]) == 0
    command = [sys.executable, str(ROOT / "examples/serve.py"), str(tmp_path / "net.pt2"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip().removeprefix("http://")
    finally:
        server.kill()
        server.wait()


@pytest.mark.long
def test_the_example_serves_what_predict_says(address: str, tmp_path: Path, capsys) -> None:
    image = make_images(tmp_path / "DIR", 1, 1) / "val/cat/0.jpg"
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "net.safetensors"), str(image)]) == 0
    said = capsys.readouterr().out.strip().removeprefix(f"{image}: ")
    connection = http.client.HTTPConnection(address, timeout=60)
    for body, status in ((image.read_bytes(), 200), (b"no image", 400)):
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        assert answer.status == status
        if status == 200:
            shares = content["classes"]
            assert ", ".join(f"{label} {100 * share:.1f} %" for label, share in shares) == said
            assert len(shares) == 4
        else:
            assert "error" in content
