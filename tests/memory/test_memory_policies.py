"""Every exact policy gives the loss, gradients, statistics, potentials and random state of ``none``."""

import copy

import memory_nets as nets
import pytest
import torch

from scalesnn import functional
from scalesnn.memory import apply_policy

EXACT = ["layer", "block", "time:2"]


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("net", list(nets.NETS))
def test_exact_in_float64(net, policy, compare):
    compare(nets.make(net), policy, nets.images())


@pytest.mark.parametrize("policy", EXACT)
def test_exact_in_float32_with_a_static_image(policy, compare):
    model = nets.make("spiking_resnet18", torch.float32)
    compare(model, policy, nets.images(torch.float32, static=True), 1e-5)


@pytest.mark.parametrize("policy", EXACT)
def test_exact_under_bfloat16_autocast(policy, compare):
    chunked = "time" in policy  # a weight's gradient is then a sum of chunks' bfloat16 ones
    model = nets.make("chain" if chunked else "own", torch.float32)
    compare(model, policy, nets.images(torch.float32), 2e-2 if chunked else 1e-5, bf16=True)


@pytest.mark.parametrize("policy", ["time:2,bn=chunk", "layer+time:2,bn=chunk", "block+time:2,bn=chunk"])
@pytest.mark.parametrize("net", ["spiking_resnet18", "own"])
def test_chunked_statistics_are_those_of_calls_with_chunks(net, policy):
    model, x = nets.make(net), nets.images()
    chunked = copy.deepcopy(model)
    expected = nets.step(lambda x: torch.cat([chunked(part) for part in x.split(2)]), x, chunked)
    nets.assert_same(nets.step(apply_policy(model, policy), x), expected, 1e-10)


@pytest.mark.parametrize("policy", ["time:2,detach,bn=chunk", "layer+time:2,detach,bn=chunk"])
def test_detach_is_truncated_backpropagation(policy):
    model, x = nets.make("own"), nets.images()
    chunked = copy.deepcopy(model)

    def truncated(x):
        outputs = []
        for part in x.split(2):
            outputs.append(chunked(part))
            functional.detach_net(chunked)
        return torch.cat(outputs)

    expected = nets.step(truncated, x, chunked)
    nets.assert_same(nets.step(apply_policy(model, policy), x), expected, 1e-10)


@pytest.mark.parametrize("policy", ["layer", "block", "time:2"])
def test_torch_compile_leaves_a_net_with_a_policy_as_it_is(policy):
    x = nets.images()
    expected = nets.step(nets.make("chain"), x)
    compiled = torch.compile(apply_policy(nets.make("chain"), policy), backend="eager")
    found = {name.replace("_orig_mod.", ""): value for name, value in nets.step(compiled, x).items()}
    nets.assert_same(found, expected, 1e-10)
