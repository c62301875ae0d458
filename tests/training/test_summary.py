"""What a run prints of its network at the start: true figures, cheap, whatever the network is."""

from __future__ import annotations

import re
import time

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from scalesnn import functional, layer, neuron, surrogate
from scalesnn.base import MemoryModule
from scalesnn.memory import apply_policy
from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet
from scalesnn.training.summary import of_one, readable, stages_of, summarise, table_of

SETTINGS = {"spiking_neuron": neuron.IFNode, "surrogate_function": surrogate.ATan(), "num_classes": 5}


def spiking(make=spiking_resnet.spiking_resnet18) -> nn.Module:
    net = make(**SETTINGS)
    functional.set_step_mode(net, "m")
    return net


def images(T: int, N: int, size: int = 32) -> Tensor:
    return functional.repeat_over_time(torch.zeros(N, 3, size, size), T)


def kept_in_a_real_forward(net: nn.Module, x: Tensor) -> int:
    """Bytes that autograd holds after a real forward pass, the net's own tensors and the input apart."""
    memories = [v for m in net.modules() if isinstance(m, MemoryModule) for v in m.memories()]
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    del memories, y
    functional.reset_net(net)
    return sum(sizes.values())


def test_the_figures_of_a_net_are_those_of_a_real_forward():
    net, x = spiking(), images(3, 2)
    summary = summarise(net, lambda: images(3, 2))
    stages = {stage.name: stage for stage in summary.stages}
    assert summary.note is None
    assert list(stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert sum(s.parameters for s in stages.values()) == sum(p.numel() for p in net.parameters())
    shapes = {}
    for name in ("layer1", "layer4", "fc"):
        getattr(net, name).register_forward_hook(
            lambda m, i, y, name=name: shapes.update({name: y.shape[2:]})
        )
    net.train()(x)
    assert [stages[n].shape for n in ("layer1", "layer4", "head")] == [*map(tuple, shapes.values())]
    firing = [m for m in net.modules() if isinstance(m, neuron.BaseNode)]
    assert sum(s.neurons for s in stages.values()) == sum(n.v.numel() for n in firing) // 2


@pytest.mark.parametrize("make", [spiking_resnet.spiking_resnet18, sew_resnet.sew_resnet18])
def test_saved_bytes_are_those_that_autograd_holds(make):
    net = spiking(make)
    found = sum(stage.saved for stage in summarise(net, lambda: images(4, 3)).stages)
    assert found == pytest.approx(kept_in_a_real_forward(net.train(), images(4, 3)), rel=0.02)


def test_saved_bytes_follow_the_policy_and_many_chunks_are_not_traced():
    saved = {}
    for policy in ("none", "layer", "block", "time:2", "time:1"):
        net = apply_policy(spiking(), policy)
        summary = summarise(net, lambda: images(6, 2))
        saved[policy] = sum(stage.saved or 0 for stage in summary.stages)
    assert saved["block"] < saved["layer"] < saved["none"]
    assert saved["time:2"] == saved["layer"]  # bits too; what differs is the working set
    assert "time:1 cuts T into many chunks" in summary.note
    assert saved["time:1"] == 0
    assert summary.stages[1].shape == (64, 8, 8)


@pytest.mark.parametrize("make", [sew_resnet.sew_resnet18, ms_resnet.ms_resnet18])
def test_the_stages_of_the_other_nets(make):
    names = [stage.name for stage in stages_of(spiking(make))]
    assert names == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def test_a_net_is_left_as_it_is():
    net = spiking().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    numbers = torch.get_rng_state()
    summarise(net, lambda: torch.rand(2, 3, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not torch.nn.modules.module._global_forward_hooks


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x.flatten(1))
        return self.fc(-x.flatten(1))


def test_a_net_that_cannot_be_traced_is_shown_without_its_shapes():
    summary = summarise(LooksAtValues(), lambda: torch.zeros(2, 3, 2, 2))
    assert "the network cannot be traced" in summary.note
    assert "\n" not in summary.note
    assert [(s.name, s.parameters, s.saved) for s in summary.stages] == [
        ("fc", 65, None),
        ("(the net's own)", 3, None),
    ]
    assert "saved" not in text_of(summary)


def text_of(summary) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(table_of(summary))
    return captured.get()


def test_a_long_flat_net_takes_few_rows_and_plain_characters():
    layers = [layer.Conv2d(3, 3, 1, step_mode="m") for _ in range(55)]
    net = nn.Sequential(*layers, nn.Flatten(2), layer.Linear(12, 5, step_mode="m"))
    summary = summarise(net, lambda: torch.zeros(2, 3, 3, 2, 2))
    assert summary.note is None
    assert 10 < len(summary.stages) <= 20
    assert summary.stages[-1].shape == (5,)
    text = text_of(summary)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    total = re.search(r"total +([\d,]+)", text)
    assert int(total[1].replace(",", "")) == sum(p.numel() for p in net.parameters())


def test_nets_that_join_time_and_batch_show_one_image():
    assert of_one((4, 2, 64, 8, 8), 4, 2, True) == (64, 8, 8)
    assert of_one((8, 64, 8, 8), 4, 2, True) == (64, 8, 8)
    assert of_one((2, 64, 8, 8), 1, 2, False) == (64, 8, 8)
    assert of_one((3, 7), 4, 2, True) == (3, 7)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (2**55, "3.28e+04 TiB")],
)
def test_sizes_for_people(size, text):
    assert readable(size) == text


def test_the_summary_of_resnet18_is_made_in_a_moment():
    net = spiking()
    summarise(net, lambda: images(1, 1))  # what FakeTensorMode imports
    start = time.process_time()
    summarise(net, lambda: images(4, 32, 224))
    assert time.process_time() - start < 0.6
