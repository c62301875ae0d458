"""Out of memory in the first steps: the next policy that needs less.

One process goes on from the same batch. Several ranks start again together: the one that ran out has left
others in collectives that cannot be finished (``parallel.start_again``). The policies are ``memory``'s.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from scalesnn import functional
from scalesnn.base import UserError
from scalesnn.memory.planner import gib
from scalesnn.memory.policy import Policy, apply_policy, policies_below, policy_of
from scalesnn.parallel.devices import first_line
from scalesnn.parallel.start_again import StartTogether

__all__ = ["FIRST_STEPS", "Fallback", "free_frames", "is_out_of_memory"]

FIRST_STEPS = 3
SIGNS = (  # in lower case
    "out of memory",  # CUDA, NCCL
    "can't allocate memory",  # torch's allocator on a CPU
    "_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER: CUBLAS_STATUS_ALLOC_FAILED
    "_allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "unable to find a valid cudnn algorithm",  # none whose workspace fits
    "find was unable to find an engine",
)
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that device or host memory has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)


def free_frames(error: BaseException) -> None:
    """Let go of what the frames that an exception passed through hold: the activations of a broken step."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    gc.collect()


class Fallback:
    """Runs the first steps of a run so that one that does not fit is tried again under another policy.

    Use it where the loop runs forward and backward of a batch::

        fallback = Fallback(strategy.module, T, strategy.together, tracker.notice)
        loss = fallback.run(lambda: forward_and_backward(batch))

    Args:
        model: the plain net (``strategy.module``).
        T: time-steps; None for inputs without.
        together: how several ranks start again; None for one process.
        notice: where a line for the log goes.
        table: makes the plan's table for the error at the end.
        planned: the predicted peak in bytes; logged beside ``measured()`` once the first steps are over.
        held_by: a flag under which the policy cannot change.
    """

    def __init__(
        self,
        model: nn.Module,
        T: int | None,
        together: StartTogether | None,
        notice: Callable[[str], None],
        table: Callable[[], str] | None = None,
        planned: int | None = None,
        measured: Callable[[], float] = lambda: 0.0,
        held_by: str | None = None,
    ) -> None:
        self.model, self.together, self.notice, self.table = model, together, notice, table
        self.planned, self.measured, self.held_by = planned, measured, held_by
        self.left = FIRST_STEPS
        self.next = policies_below(policy_of(model), T)

    def run(self, attempt: Callable[[], Result]) -> Result:
        """``attempt()``; while the run is young, again under the next policy where memory ran out.

        Raises:
            UserError: no policy is left: names the last one, with the plan's table.
            SystemExit: all ranks start again (``StartTogether.start_again``).
        """
        if self.left <= 0:
            return attempt()
        if self.together is not None:
            return self._run_together(attempt, self.together)
        while True:
            state = [(b, b.detach().clone()) for b in self.model.buffers()]
            gradients = [  # of earlier micro-batches, in host memory: the device is full
                (p, p.grad.detach().to("cpu", copy=True))
                for p in self.model.parameters()
                if p.grad is not None
            ]
            devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
            random_state = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]
            try:
                result = attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = first_line(error)
                free_frames(error)
            else:
                self._went_well()
                return result
            self._restore(state, random_state)
            for parameter, gradient in gradients:
                parameter.grad = gradient.to(parameter.device)
            before = policy_of(self.model)
            policy = self._next_policy(said)
            apply_policy(self.model, policy)
            self.planned = None  # it was that of the other policy
            self.notice(f"out of memory with {before}: trying {policy} from the same batch ({said})")

    def _run_together(self, attempt: Callable[[], Result], together: StartTogether) -> Result:
        """``attempt()`` on one of several ranks: once all are through it, its result."""
        policy, said, results = None, "", []
        try:
            results.append(attempt())
        except Exception as error:
            if is_out_of_memory(error):
                said = f"out of memory with {policy_of(self.model)}: {first_line(error)}"
                free_frames(error)
                try:
                    policy = str(self._next_policy(said))
                except UserError as last:
                    together.announce(first_line(last))
                    raise
            elif together.pending() is None:
                raise
            else:  # what breaks a connection here is that another rank has left
                free_frames(error)
        if together.agree(policy, said) is not None:
            raise together.start_again()
        self._went_well()
        if not self.left:
            together.stop()
        return results[0]

    def _went_well(self) -> None:
        self.left -= 1
        if not self.left and self.planned is not None:
            self.notice(
                f"memory of the first {FIRST_STEPS} steps: peak {gib(self.measured())}, "
                f"predicted {gib(self.planned)}"
            )

    def _next_policy(self, said: str) -> Policy:
        if self.held_by is not None:
            raise UserError(
                f"out of memory with {self.held_by}, which leaves no other --activation-checkpoint to try: "
                f"leave it out, or reduce batch or T ({said})"
            )
        if self.next:
            return self.next.pop(0)
        table = f"\n{self.table()}" if self.table else ""
        raise UserError(
            f"out of memory with --activation-checkpoint {policy_of(self.model)} too: reduce batch or T "
            f"({said}){table}"
        )

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
