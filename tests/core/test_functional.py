"""Whole-net functions."""

import copy

import pytest
import torch
from torch import nn

from scalesnn import functional, layer, neuron
from scalesnn.base import UserError


def small_net() -> nn.Sequential:
    return nn.Sequential(
        layer.Linear(3, 4), neuron.LIFNode(), layer.Dropout(0.2), nn.Sequential(neuron.IFNode())
    )


def test_reset_net_gives_the_same_result_again():
    net = small_net().eval()
    x = torch.randn(2, 3) + 1
    first = [net(x) for _ in range(3)]
    functional.reset_net(net)
    assert net[1].v == net[3][0].v == 0.0
    assert all(torch.equal(net(x), y) for y in first)


def test_reset_net_calls_a_reset_of_the_users_own_module():
    class Counter(nn.Module):
        resets = 0

        def reset(self):
            self.resets += 1

    net = nn.Sequential(Counter())
    functional.reset_net(net)
    assert net[0].resets == 1


def test_detach_net_cuts_the_graph_and_keeps_the_values():
    net = nn.Sequential(nn.Linear(3, 3), neuron.IFNode(v_threshold=10.0))
    net(torch.randn(2, 3))
    before = net[1].v
    assert before.requires_grad
    functional.detach_net(net)
    assert torch.equal(net[1].v, before)
    net(torch.randn(2, 3)).sum().backward()
    net(torch.randn(2, 3))  # without a second graph, backward through the first step is not needed


def test_set_step_mode_reaches_every_layer():
    net = small_net()
    functional.set_step_mode(net, "m")
    assert [m.step_mode for m in net.modules() if hasattr(m, "step_mode")] == ["m"] * 4
    functional.check_step_mode(net)
    functional.set_step_mode(net, "s")
    functional.check_step_mode(net, "s")


def test_set_step_mode_reaches_a_module_of_ones_own():
    class Mine(nn.Module):
        step_mode = "s"

    net = nn.Sequential(Mine())
    functional.set_step_mode(net, "m")
    assert net[0].step_mode == "m"


@pytest.mark.parametrize("mode", ["x", "multi", None])
def test_set_step_mode_refuses_other_modes(mode):
    with pytest.raises(UserError, match="step_mode must be 's' or 'm'"):
        functional.set_step_mode(small_net(), mode)


def test_check_step_mode_names_the_layer_and_the_cure():
    net = small_net()
    with pytest.raises(UserError, match=r"^0 \(Linear\) is in step mode 's'.*set_step_mode\(model, 'm'\)"):
        functional.check_step_mode(net)
    functional.set_step_mode(net, "m")
    net[3][0].step_mode = "s"
    with pytest.raises(UserError, match=r"^3\.0 \(IFNode\)"):
        functional.check_step_mode(net)


def test_check_step_mode_does_not_look_into_containers():
    functional.check_step_mode(nn.Sequential(layer.SeqToANNContainer(layer.Linear(2, 2))))


def test_set_backend_sets_the_chosen_neurons():
    net = small_net()
    functional.set_backend(net, "torch", instance=neuron.LIFNode)
    assert (net[1].backend, net[3][0].backend) == ("torch", "auto")
    functional.set_backend(net, "torch")
    assert net[3][0].backend == "torch"
    with pytest.raises(UserError, match="got 'abacus'"):
        functional.set_backend(net, "abacus")


def test_multi_step_and_seq_to_ann_take_modules_functions_and_lists():
    linear = nn.Linear(3, 4)
    x_seq = torch.randn(5, 2, 3)
    expected = torch.stack([linear(x).relu() for x in x_seq])
    for run in (functional.multi_step_forward, functional.seq_to_ann_forward):
        for stateless in ([linear, torch.relu], (linear, nn.ReLU()), nn.Sequential(linear, nn.ReLU())):
            torch.testing.assert_close(run(x_seq, stateless), expected)
        torch.testing.assert_close(run(x_seq, linear), linear(x_seq))


@pytest.mark.parametrize("split", [1, 2, 3, 7])
def test_chunks_of_time_carry_the_state(split):
    node = neuron.LIFNode(step_mode="m")
    twin = copy.deepcopy(node)
    x_seq = torch.randn(7, 3) + 1
    torch.testing.assert_close(functional.chunk_multi_step_forward(split, x_seq, node), twin(x_seq))
    torch.testing.assert_close(node.v, twin.v)


def test_repeat_over_time_takes_no_memory():
    x = torch.randn(2, 3)
    x_seq = functional.repeat_over_time(x, 4)
    assert x_seq.shape == (4, 2, 3)
    assert x_seq.data_ptr() == x.data_ptr()
    assert x_seq.stride(0) == 0
    with pytest.raises(UserError, match="T must be at least 1, got 0"):
        functional.repeat_over_time(x, 0)
