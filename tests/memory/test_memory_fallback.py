"""Out of memory: the next policy, the same batch, the same result."""

import copy

import memory_nets as nets
import pytest
import torch

from scalesnn.base import UserError
from scalesnn.memory import Policy, policy_of
from scalesnn.memory.fallback import Fallback, is_out_of_memory, ladder


def test_the_step_runs_under_the_next_policy_with_the_same_result():
    model, x = nets.make("own"), nets.images()
    expected = nets.step(copy.deepcopy(model), x)
    notices, tries = [], []

    def attempt():
        found = nets.step(model, x)
        tries.append(str(policy_of(model)))
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    found = Fallback(model, 5, bool, notices.append).run(attempt)
    assert tries == ["none", "layer", "layer+time:2"]
    assert len(notices) == 2
    nets.assert_same(found, expected, 1e-10)


def test_whole_gradients_are_given_up_first():
    names = [str(p) for p in ladder(Policy.parse("layer+time:8,whole"), 64)]
    assert names == ["layer+time:8", "layer+time:2"]


def test_another_rank_without_memory_counts():
    model, answers = nets.make("chain"), [True, False]
    Fallback(model, None, lambda failed: answers.pop(0), lambda text: None).run(lambda: None)
    assert str(policy_of(model)) == "layer"


def test_the_end_of_the_ladder_is_one_clear_error():
    def attempt():
        raise MemoryError

    with pytest.raises(UserError, match="layer"):
        Fallback(nets.make("chain"), None, bool, lambda text: None).run(attempt)


def test_other_errors_are_not_caught():
    def attempt():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Fallback(nets.make("chain"), None, bool, lambda text: None).run(attempt)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_errors_that_mean_out_of_memory(error):
    assert is_out_of_memory(error)


def test_the_measured_peak_is_logged_beside_the_predicted_one():
    notices = []
    fallback = Fallback(nets.make("chain"), 5, bool, notices.append, None, 3 * 2**20, lambda: 5.0 * 2**20)
    for _ in range(5):
        fallback.run(lambda: None)
    assert notices == ["memory of the first 3 steps: peak 5 MiB, predicted 3 MiB"]
