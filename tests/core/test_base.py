"""Memories of modules."""

import pytest
import torch

from scalesnn.base import MemoryModule, MultiStepModule, UserError


class Accumulator(MemoryModule):
    """Sums its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("total", torch.zeros(1))

    def single_step_forward(self, x):
        self.total = self.total + x
        return self.total


def test_a_memory_is_an_attribute_but_no_buffer():
    module = Accumulator()
    module.total = torch.ones(1)
    assert module.total.item() == 1
    assert dict(module.named_memories()) == {"total": module.total}
    assert list(module.memories()) == [module.total]
    assert module.state_dict() == {}


def test_reset_does_not_share_the_reset_value():
    module = Accumulator()
    module.total += 5  # in place
    module.reset()
    assert module.total.item() == 0


def test_set_reset_value():
    module = Accumulator()
    module.set_reset_value("total", torch.full((1,), 3.0))
    module.reset()
    assert module.total.item() == 3
    with pytest.raises(KeyError, match="nothing"):
        module.set_reset_value("nothing", 0)


def test_forward_follows_the_step_mode():
    module = Accumulator()
    assert module(torch.ones(1)).tolist() == [1]
    module.step_mode = "m"
    assert module(torch.ones(2, 1)).flatten().tolist() == [2, 3]


def test_a_taken_name_is_refused():
    module = Accumulator()
    for name in ("total", "forward"):
        with pytest.raises(ValueError, match=name):
            module.register_memory(name, 0)


def test_a_memory_can_be_deleted():
    module = Accumulator()
    del module.total
    assert not hasattr(module, "total")
    module.reset()


def test_a_multi_step_module_refuses_single_steps():
    class Only(torch.nn.Module, MultiStepModule):
        pass

    with pytest.raises(UserError, match="step_mode of Only must be 'm', got 's'"):
        Only().step_mode = "s"


def test_memories_move_with_the_module():
    module = Accumulator().double()
    assert module.total.dtype == torch.float64
    module.reset()
    assert module.total.dtype == torch.float64
