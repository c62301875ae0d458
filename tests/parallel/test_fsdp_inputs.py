"""FSDP2 with bfloat16 weights casts a net's inputs without writing a repeated image out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalesnn import functional, neuron, surrogate
from scalesnn.model import spiking_resnet
from scalesnn.parallel import Topology, add_parallel_arguments, create_strategy
from scalesnn.parallel.fsdp import cast_inputs
from scalesnn.parallel.topology import free_port

T = 4


def net() -> nn.Module:
    torch.manual_seed(0)
    made = spiking_resnet.spiking_resnet18(
        num_classes=10,
        spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
    functional.set_step_mode(made, "m")
    return made


@pytest.fixture
def strategy(tmp_path: Path) -> Any:
    (tmp_path / "fsdp.yaml").write_text("param_dtype: bfloat16\n")
    parser = argparse.ArgumentParser()
    add_parallel_arguments(parser)
    args = parser.parse_args(["--fsdp-config", str(tmp_path / "fsdp.yaml")])
    args.disable_amp = True
    made = create_strategy(args, Topology(master_port=free_port(), interface="lo"))
    made.setup_device("cpu")
    yield made
    made.close()


def test_a_repeated_image_stays_one_image(strategy: Any) -> None:
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    x = functional.repeat_over_time(images, T)
    seen: list[Tensor] = []
    strategy.prepare(net(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1), lambda optimizer: None)
    strategy.module.conv1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    inside: list[torch.dtype] = []
    for block in strategy.module.layer1:
        block.conv1.register_forward_pre_hook(lambda module, given: inside.append(given[0].dtype))
    strategy.model(x).mean(0).sum().backward()
    (stem,) = seen
    assert stem.shape == x.shape
    assert stem.dtype == torch.bfloat16
    assert stem.stride(0) == 0
    assert stem.untyped_storage().nbytes() == images.numel() * 2
    assert stem[0].is_contiguous(memory_format=torch.channels_last)
    assert inside == [torch.bfloat16] * 2
    assert all(p.grad is not None for p in strategy.module.parameters())


def test_a_cast_keeps_values_strides_of_repeats_and_gradients() -> None:
    wide = torch.randn(1, 3, 1, 5, dtype=torch.float64, requires_grad=True)
    x = wide.expand(4, 3, 6, 5)
    labels = torch.arange(3)
    (y, same), named = cast_inputs(torch.float32, nn.Identity(), (x, labels), {"residual": x, "neuron": None})
    assert same is labels
    assert named["neuron"] is None
    assert y.stride() == (0, 5, 0, 1)
    assert torch.equal(y, x.float())
    assert torch.equal(named["residual"], y)
    y.sum().backward()
    assert wide.grad is not None
    assert bool((wide.grad == 24).all())


def test_what_has_the_dtype_is_handed_on() -> None:
    x = torch.randn(2, 3)
    (y,), _ = cast_inputs(torch.float32, nn.Identity(), (x,), {})
    assert y is x
