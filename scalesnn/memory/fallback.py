"""Out of memory in the first steps: the next policy that needs less, from the same batch, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from scalesnn import functional
from scalesnn.base import UserError
from scalesnn.memory.planner import gib
from scalesnn.memory.policy import Policy, apply_policy, policy_of

__all__ = ["FIRST_STEPS", "Fallback", "is_out_of_memory"]

FIRST_STEPS = 3
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that device or host memory has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class Fallback:
    """Runs the first steps of a run so that one that does not fit is tried again under another policy.

    Use it where the loop runs forward and backward of a batch::

        fallback = Fallback(strategy.module, T, strategy.any_rank, tracker.notice)
        loss = fallback.run(lambda: forward_and_backward(batch))

    Args:
        model: the plain net (``strategy.module``).
        T: time-steps; None for inputs without.
        any_rank: whether a flag is set on any rank; collective.
        notice: where a line for the log goes.
        table: makes the plan's table for the error at the end.
        planned: the predicted peak in bytes; logged beside ``measured()`` once the first steps are over.

    Forward and backward contain collectives of the strategy: a rank that runs out of memory between two of
    them leaves the others waiting in theirs. So with several ranks, memory that runs out in a part without
    collectives is caught together; elsewhere the waiting ends with the process group's time limit.
    """

    def __init__(
        self,
        model: nn.Module,
        T: int | None,
        any_rank: Callable[[bool], bool],
        notice: Callable[[str], None],
        table: Callable[[], str] | None = None,
        planned: int | None = None,
        measured: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.model, self.any_rank, self.notice, self.table = model, any_rank, notice, table
        self.planned, self.measured = planned, measured
        self.left = FIRST_STEPS
        self.next = list(ladder(policy_of(model), T))

    def run(self, attempt: Callable[[], Result]) -> Result:
        """``attempt()``; while the run is young, again under the next policy where memory ran out.

        Raises:
            UserError: no policy is left: names the last one, with the plan's table.
        """
        if self.left <= 0:
            return attempt()
        while True:
            state = [(b, b.detach().clone()) for b in self.model.buffers()]
            devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
            random_state = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]
            result, failed = None, False
            try:
                result = attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            if not self.any_rank(failed):
                self.left -= 1
                if not self.left and self.planned is not None:
                    self.notice(
                        f"memory of the first {FIRST_STEPS} steps: peak {gib(self.measured())}, "
                        f"predicted {gib(self.planned)}"
                    )
                return result  # type: ignore[return-value]
            self._restore(state, random_state)
            before = policy_of(self.model)
            if not self.next:
                table = f"\n{self.table()}" if self.table else ""
                raise UserError(
                    f"out of memory with --activation-checkpoint {before} too: reduce batch or T{table}"
                )
            policy = self.next.pop(0)
            apply_policy(self.model, policy)
            self.planned = None  # it was that of the other policy
            self.notice(f"out of memory with {before}: trying {policy} from the same batch")

    def _restore(
        self,
        buffers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        random_state: tuple[torch.Tensor, list[torch.Tensor]],
    ) -> None:
        """Undo what a broken attempt left: gradients, potentials, running statistics, random numbers."""
        functional.reset_net(self.model)
        self.model.zero_grad(set_to_none=True)
        for buffer, value in buffers:
            buffer.data.copy_(value)
        torch.set_rng_state(random_state[0])
        if torch.cuda.is_initialized():
            torch.cuda.set_rng_state(random_state[1][0])
            torch.cuda.empty_cache()


def ladder(policy: Policy, T: int | None) -> list[Policy]:
    """The exact policies that need less memory than ``policy``, in the order in which to try them."""
    names = ["none", "layer"]
    steps = (T or 1) // 2
    while T and steps >= 1:
        names.append(f"layer+time:{steps}")
        steps //= 4
    found = [Policy.parse(name) for name in names]
    if policy.steps:
        smaller = [p for p in found if 0 < p.steps < policy.steps]
        return [replace(policy, whole=False), *smaller] if policy.whole else smaller
    if (policy.layer and policy.only is None) or policy.block:
        return found[2:]
    return found[1:]
