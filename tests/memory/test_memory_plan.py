"""The planner against what runs; its command; the choice of ``auto``."""

import argparse
import json

import memory_nets as nets
import pytest
import torch

from scalesnn.base import UserError
from scalesnn.memory import Policy, add_memory_arguments, policy_of, prepare
from scalesnn.memory.arguments import bytes_of, free_memory
from scalesnn.memory.plan_command import add_plan_command
from scalesnn.memory.planner import Planner

SHAPE = (4, 8, 3, 128, 128)
LONG = (16, *SHAPE[1:])  # at T = 4 chunks of time cost more than they save


@pytest.fixture(scope="module")
def planner():
    return Planner(nets.make("spiking_resnet18", torch.float32), SHAPE, 10**9, device_type="cpu")


def test_saved_bytes_are_those_that_autograd_keeps():
    shape = (4, 2, 3, 32, 32)
    model = nets.make("chain", torch.float32)
    x = torch.randn(shape)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), x]}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nets.functional.reset_net(model)
        out = model(x)
    assert out is not None
    predicted = Planner(model, shape, 10**9, device_type="cpu", static=False).trace(Policy()).saved
    assert predicted == pytest.approx(sum(sizes.values()), rel=0.05)


@pytest.fixture(scope="module")
def long_planner():
    return Planner(nets.make("spiking_resnet18", torch.float32), LONG, 10**9, device_type="cpu")


def test_policies_need_less_memory_and_more_time(long_planner):
    none, layer, chunks = (long_planner.plan(Policy.parse(p)) for p in ("none", "layer", "time:4"))
    assert layer.saved < none.saved / 2
    assert chunks.peak <= layer.peak <= 1.01 * none.peak  # here the stem's gradient is the largest
    assert none.step_time == 1 < layer.step_time


def test_the_largest_T_is_the_largest(planner):
    layer = Policy.parse("layer")
    planner.budget = planner.peak(layer, (12, *SHAPE[1:])) + 1000
    largest = planner.plan(layer).largest_T
    assert 10 <= largest <= 12
    assert planner.peak(layer, (largest, *SHAPE[1:])) <= planner.budget


def test_sharding_takes_its_share():
    model = nets.make("chain", torch.float32)
    one = Planner(model, SHAPE, 1, strategy="ddp", world_size=8, optimizer="adamw").plan(Policy())
    two = Planner(model, SHAPE, 1, strategy="zero2", world_size=8, optimizer="adamw").plan(Policy())
    assert two.optimizer == one.optimizer // 8
    assert two.gradients == one.gradients // 8
    assert two.parameters == one.parameters
    assert not one.fits


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_memory_arguments(parser)
    return parser.parse_args(words)


def test_auto_takes_the_cheapest_that_fits():
    model = nets.make("chain", torch.float32)
    planner = Planner(model, LONG, 10**9, device_type="cpu")
    needs = {p: planner.peak(Policy.parse(p)) for p in ("none", "time:4")}

    def chosen(budget):
        args = arguments("--activation-checkpoint", "auto", "--memory-budget", str(budget))
        found = prepare(args, model, LONG, "single", 1, torch.device("cpu"))
        assert "predicted peak" in found.notices[0]
        assert found.planned_bytes is not None
        assert found.planned_bytes <= budget
        return policy_of(model)

    assert chosen(needs["none"]) == Policy()
    assert chosen(needs["time:4"] + 10**5) != Policy()
    with pytest.raises(UserError, match="largest T"):
        chosen(10**6)


def test_the_command_prints_json(capsys):
    parser = argparse.ArgumentParser()
    add_plan_command(parser.add_subparsers())
    words = [
        "plan",
        "--T",
        "4",
        "-b",
        "2",
        "--size",
        "64",
        "--gpu-memory",
        "1GiB",
        "--policy",
        "none",
        "--policy",
        "layer",
        "--json",
    ]
    args = parser.parse_args(words)
    assert args.run(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["policy"] for p in found["policies"]] == ["none", "layer"]
    assert all(p["fits"] for p in found["policies"])


@pytest.mark.parametrize(
    ("text", "size"), [("70GiB", 70 * 2**30), ("2GB", 2 * 10**9), ("1.5M", 1.5 * 2**20), ("7", 7)]
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "lots", "0GiB", "-1G"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="memory-budget"):
        bytes_of(text)


@pytest.mark.parametrize(
    "text", ["", "layers", "time:0", "time", "layer,detach", "time:2,bn", "block+layer", "none+layer"]
)
def test_policies_that_are_none(text):
    with pytest.raises(UserError, match="policy"):
        Policy.parse(text)


def test_auto_leaves_room_on_a_gpu_for_what_no_plan_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 85 * 10**9))
    assert free_memory(torch.device("cuda", 0)) == 70 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 85 * 10**9))
    assert free_memory(torch.device("cuda", 0)) == 0
