"""``--cuda-graph``: a training step as one CUDA graph, launched by one call of the host.

The first steps run as ever. Then the step (forward, loss, backward, norm of the gradients, clipping, update)
is rehearsed once, with every wait of the host for the device an error, recorded, and from then on replayed: a
batch is copied into the place of the recorded one. What a replay cannot do in Python is done on the device:
the learning rate is a tensor, and the optimizer leaves out a step whose gradients are not finite. After a
replay the host reads one number, the norm of the gradients. Steps at which spiking health is measured, and
batches of another shape, run as ever.
"""

from __future__ import annotations

import contextlib
import math
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalesnn.base import UserError
from scalesnn.memory.policy import Policy
from scalesnn.parallel.devices import first_line
from scalesnn.parallel.strategy import StepResult, Strategy
from scalesnn.tracking import StepTimer
from scalesnn.training.cuda_recorder import CudaRecorder

__all__ = ["WARM_UP", "StepGraph", "check_cuda_graph", "check_fused"]

LIBRARY = ("/torch/",)  # whose lines are not the cause of an error
WARM_UP = 3  # steps: by then cuDNN, cuBLAS and the kernels are loaded, and the optimizer has its state
Passed = tuple[Tensor, Tensor, StepResult]


def check_cuda_graph(args: Any, strategy: Strategy) -> None:
    """Refuse ``--cuda-graph`` where a step cannot be recorded, before any long work.

    Raises:
        UserError: names what is in the way.
    """
    if not args.cuda_graph:
        return
    policy = args.activation_checkpoint
    parsed = Policy() if policy == "auto" else Policy.parse(policy)
    problem = None
    if strategy.device.type != "cuda":
        problem = "needs a GPU, but this run is on the CPU"
    elif strategy.name != "single":
        problem = f"is for one process, but --strategy {strategy.name} reduces over ranks amid the step"
    elif strategy.accumulation > 1:
        problem = f"records one batch a step, but --gradient-accumulation makes it {strategy.accumulation}"
    elif parsed.block or parsed.chunk_norm:
        problem = f"is not for --activation-checkpoint {policy}, which asks the host for random states"
    if problem:
        raise UserError(f"--cuda-graph {problem}: leave --cuda-graph out")


def check_fused(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that must ask the host whether to leave out a step.

    Raises:
        UserError: it has no fused form.
    """
    if "fused" not in optimizer.defaults:
        raise UserError(
            f"--cuda-graph: {type(optimizer).__name__} has no fused form, which could leave out a step by "
            "itself; give --opt sgd, sgd_nesterov or adamw, or leave --cuda-graph out"
        )


class StepGraph:
    """Takes training steps, by a recorded graph as soon as there is one.

    Args:
        strategy: whose optimizer updates the weights; it is switched to its fused form.
        timer: of the step's phases, which a recorded step does not have.
        due: whether the next step is measured, which a recorded step cannot be.
        eager: an ordinary step: (images, targets) to (logits, loss, result).
        learn: its forward and backward: (images, targets) to (logits, loss).
        recorder: None: a ``CudaRecorder``.
    """

    def __init__(
        self,
        strategy: Strategy,
        timer: StepTimer,
        due: Callable[[], bool],
        eager: Callable[[Tensor, Tensor], Passed],
        learn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        recorder: Any = None,
    ) -> None:
        self.strategy, self.timer, self.due, self.eager, self.learn = strategy, timer, due, eager, learn
        self.recorder = CudaRecorder() if recorder is None else recorder
        self.groups = strategy.optimizer.param_groups
        self.rates = [torch.full((), float(g["lr"]), device=strategy.device) for g in self.groups]
        self.left = WARM_UP
        self.rehearsed = False
        self.replay: Callable[[], None] | None = None
        self.batch: tuple[Tensor, Tensor] | None = None  # where a recorded step finds its images and targets
        self.outputs: list[Tensor] = []  # logits, loss, norm of the gradients
        for group in self.groups:  # in all steps: one kernel that can leave a step out
            group["fused"], group["foreach"] = True, False
        for parameter, state in strategy.optimizer.state.items():  # of a resumed run
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device)

    def __call__(self, images: Tensor, targets: Tensor) -> Passed:
        """Take a step.

        Raises:
            UserError: something in the step waits for the device, or draws random numbers on the host.
        """
        measured = self.due()
        if measured or self.left > 0 or not self._fits(images, targets):
            with self.recorder.stream():
                passed = self.eager(images, targets)
            if passed[2].stepped and not measured and self.left > 0:
                self.left -= 1
                self.batch = images.clone(), targets.clone()
            return passed
        assert self.batch is not None
        for place, value in zip(self.batch, (images, targets), strict=True):
            place.copy_(value, non_blocking=True)
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(float(group["lr"]))
        with self.timer.phase("graph"):
            self._take()
        logits, loss, norm = self.outputs
        finite = math.isfinite(float(norm))
        return logits, loss, self.strategy.count(StepResult(norm, finite, skipped=not finite))

    def _take(self) -> None:
        """Rehearse the step, which takes it too; from the second call on, replay it, recorded."""
        if not self.rehearsed:
            with self._without_host(), self.recorder.stream(), self.recorder.rehearsal():
                self._step()
            self.rehearsed = True
            return
        if self.replay is None:
            with self._without_host():
                self.replay = self.recorder.record(self._step)
        self.replay()

    @contextlib.contextmanager
    def _without_host(self) -> Iterator[None]:
        """Say what needs the host."""
        numbers = _host_random_state()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"--cuda-graph: {_place(error)}; leave --cuda-graph out") from error
        if _host_random_state() != numbers:
            raise UserError(
                "--cuda-graph: the step draws random numbers on the host, which a recorded step would not; "
                "draw them on the GPU, or leave --cuda-graph out"
            )

    def _fits(self, images: Tensor, targets: Tensor) -> bool:
        if self.batch is None:
            return False
        return all(
            a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
            for a, b in zip(self.batch, (images, targets), strict=True)
        )

    def _step(self) -> None:
        """The whole step on the device; ``outputs`` are what it leaves."""
        assert self.batch is not None
        strategy, optimizer = self.strategy, self.strategy.optimizer
        optimizer.zero_grad(set_to_none=True)
        with self.timer.paused():
            logits, loss = self.learn(*self.batch)
        norm = strategy._gradient_norm()
        if strategy.clip_grad_norm > 0:
            strategy._clip(norm)
        with _on_device(optimizer, self.rates, ~torch.isfinite(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.outputs = [logits, loss, norm]


@contextlib.contextmanager
def _on_device(optimizer: Any, rates: list[Tensor], leave_out: Tensor) -> Iterator[None]:
    """Have a step of the optimizer read its rates, and whether to be left out, on the device."""
    groups = optimizer.param_groups
    before = [{key: group[key] for key in ("lr", "capturable") if key in group} for group in groups]
    optimizer.grad_scale, optimizer.found_inf = None, leave_out.float()
    for group, rate, old in zip(groups, rates, before, strict=True):
        group.update({**dict.fromkeys(old, True), "lr": rate})
    try:
        yield
    finally:
        for group, old in zip(groups, before, strict=True):
            group.update(old)
        del optimizer.grad_scale, optimizer.found_inf


def _host_random_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), name, np.asarray(keys).tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def _place(error: BaseException) -> str:
    """What in the step cannot be recorded, and in which line of whose code."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not any(part in f.filename for part in LIBRARY)
    ]
    where = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"the step cannot be recorded, because something in it needs the host: {first_line(error)}{where}"
