"""Out of memory: the next policy, the same batch, the same result."""

import copy
import gc
import weakref

import memory_nets as nets
import pytest
import torch

from scalesnn.base import UserError
from scalesnn.memory import apply_policy, policy_of
from scalesnn.training.out_of_memory import Fallback, is_out_of_memory


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

    found = Fallback(model, 5, None, notices.append).run(attempt)
    assert tries == ["none", "layer", "time:2"]
    assert len(notices) == 2
    nets.assert_same(found, expected, 1e-10)


def test_gradients_of_earlier_micro_batches_are_kept():
    model, x = nets.make("own"), nets.images()
    nets.step(model, x)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    tries = []

    def attempt():
        tries.append(1)
        if len(tries) == 1:
            for p in model.parameters():  # half of a backward pass
                p.grad += 7
            full()

    Fallback(model, 5, None, print).run(attempt)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name]), name


class OtherRanks:
    """Stands for the other ranks: ``theirs`` is the policy that one of them asks for."""

    def __init__(self, theirs: str | None = None, decided: bool = False) -> None:
        self.theirs, self.decided = theirs, theirs if decided else None
        self.asked, self.announced, self.stopped = [], [], False
        self.announce = self.announced.append

    def agree(self, policy, said=""):
        self.asked.append((policy, said))
        self.decided = policy or self.theirs
        return self.decided

    def pending(self):
        return self.decided

    def start_again(self):
        return SystemExit(75)

    def stop(self):
        self.stopped = True


def full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def test_of_several_ranks_the_one_that_is_full_asks_for_the_next_policy():
    others = OtherRanks()
    with pytest.raises(SystemExit):
        Fallback(nets.make("chain"), None, others, print).run(full)
    said = "out of memory with none: CUDA out of memory. Tried to allocate 2 GiB"
    assert others.asked == [("layer", said)]


def test_a_rank_that_has_room_follows_one_that_has_not():
    others, model = OtherRanks("layer"), nets.make("chain")
    with pytest.raises(SystemExit):
        Fallback(model, None, others, print).run(lambda: None)
    assert others.asked == [(None, "")]
    assert str(policy_of(model)) == "none", "it is the new process that takes the policy"


def test_a_connection_that_breaks_because_ranks_start_again_is_no_error():
    def broken():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(SystemExit):
        Fallback(nets.make("chain"), None, OtherRanks("layer", decided=True), print).run(broken)
    with pytest.raises(RuntimeError, match="closed by peer"):
        Fallback(nets.make("chain"), None, OtherRanks(), print).run(broken)


def test_several_ranks_go_on_once_the_first_steps_went_well():
    others = OtherRanks()
    fallback = Fallback(nets.make("chain"), None, others, print)
    assert [fallback.run(lambda: 7) for _ in range(5)] == [7] * 5
    assert len(others.asked) == 3
    assert others.stopped


def test_a_rank_at_the_end_of_the_ladder_tells_the_others():
    others = OtherRanks()
    model = apply_policy(nets.make("chain"), "layer")
    with pytest.raises(UserError, match="out of memory with --activation-checkpoint layer too"):
        Fallback(model, None, others, print).run(full)
    assert others.announced[0].startswith("out of memory with --activation-checkpoint layer too")
    assert others.asked == []


def test_nothing_of_a_broken_step_is_held_when_it_is_tried_again():
    model, held = nets.make("chain"), []

    class Activation:
        pass

    def attempt():
        if held:
            return [reference() for reference in held]
        activation = Activation()
        held.append(weakref.ref(activation))
        try:
            full()
        except torch.OutOfMemoryError as error:
            kept = error  # the frame, the error and its traceback hold each other
            raise kept from None

    gc.disable()
    try:
        assert Fallback(model, None, None, print).run(attempt) == [None]
    finally:
        gc.enable()


def test_the_end_of_the_ladder_is_one_clear_error():
    def attempt():
        raise MemoryError

    with pytest.raises(UserError, match="layer"):
        Fallback(nets.make("chain"), None, None, lambda text: None).run(attempt)


def test_other_errors_are_not_caught():
    def attempt():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Fallback(nets.make("chain"), None, None, lambda text: None).run(attempt)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    ],
)
def test_errors_that_mean_out_of_memory(error):
    assert is_out_of_memory(error)


def test_the_measured_peak_is_logged_beside_the_predicted_one():
    notices = []
    fallback = Fallback(nets.make("chain"), 5, None, notices.append, None, 3 * 2**20, lambda: 5.0 * 2**20)
    for _ in range(5):
        fallback.run(lambda: None)
    assert notices == ["memory of the first 3 steps: peak 5 MiB, predicted 3 MiB"]
