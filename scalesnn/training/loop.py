"""The training loop and the evaluation loop: the only places that run a network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn import functional
from scalesnn.base import UserError
from scalesnn.parallel.strategy import StepResult, Strategy
from scalesnn.tracking import NullTracker, SpikeMonitor, StepProfiler, StepTimer, Tracker
from scalesnn.training.checkpoint import CheckpointManager, Progress
from scalesnn.training.ema import ModelEma
from scalesnn.training.hang_watch import HangWatch
from scalesnn.training.metrics import Averages, fit_targets
from scalesnn.training.out_of_memory import Fallback
from scalesnn.training.preemption import Preemption
from scalesnn.training.step_graph import StepGraph

if TYPE_CHECKING:
    from scalesnn.model.train_classify import Trainer

__all__ = ["Run", "evaluate", "train_one_epoch"]

NAMES = ("loss", "acc1", "acc5")


@dataclass
class Run:
    """All that lives as long as a run does; made by ``Trainer.main``, read by the loops."""

    args: Any
    folder: Path
    device: torch.device
    strategy: Strategy
    data: Any
    tracker: Tracker | NullTracker
    checkpoints: CheckpointManager
    progress: Progress
    timer: StepTimer
    spikes: SpikeMonitor
    profiler: StepProfiler
    fallback: Fallback
    preemption: Preemption
    hang_watch: HangWatch
    settings: dict[str, Any]
    ema: ModelEma | None = None
    averages: Averages | None = None  # of the epoch so far
    unevaluated: dict[str, Any] | None = None  # step and epoch of a checkpoint, saved but not evaluated yet
    saved: Path | None = None  # the newest checkpoint
    saved_progress: Progress | None = None  # of its moment
    graph: StepGraph | None = None  # of --cuda-graph

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch on this rank: whole steps only, where --gradient-accumulation joins several."""
        steps = len(self.data.train) // self.strategy.accumulation
        return steps * self.strategy.accumulation

    @property
    def finished(self) -> bool:
        """Whether --max-steps is reached."""
        return self.args.max_steps is not None and self.progress.step >= self.args.max_steps

    @property
    def interrupted(self) -> bool:
        """Whether all ranks have agreed to end after a signal."""
        return self.preemption.was_agreed

    def save(self) -> Path:
        """Write a checkpoint of this moment, unless the newest one is of it already; collective."""
        if self.saved is not None and self.saved_progress == self.progress:
            return self.saved
        averages = None
        if self.averages is not None:
            averages = self.strategy.reduce_sum(self.averages.sums).tolist()
        extra = {"averages": averages, "settings": self.settings, "unevaluated": self.unevaluated}
        began = time.monotonic()
        self.saved = self.checkpoints.save(self.progress, extra=extra)
        self.saved_progress = replace(self.progress)
        self.tracker.log_checkpoint(self.saved, seconds=time.monotonic() - began)
        return self.saved

    def mark(self, *, is_best: bool) -> None:
        """Note in the newest checkpoint that it is evaluated now; collective."""
        self.unevaluated = None
        assert self.saved is not None
        self.checkpoints.mark(self.saved, self.progress, is_best=is_best)
        self.saved_progress = replace(self.progress)
        if is_best:
            self.tracker.log_checkpoint(self.saved, best=True)


def train_one_epoch(
    trainer: Trainer, model: nn.Module, criterion: nn.Module, loader: Any, epoch: int, args: Any
) -> dict[str, float]:
    """Train on the rest of an epoch, from ``run.progress.batch`` on. The order of events in one pass:

        images, targets ← loader                 waits for data
        x_TNCHW ← trainer.preprocess_train_sample
        output_NK ← trainer.process_model_output(model(x))      under autocast
        loss ← criterion, strategy.backward      gradients are reduced here
        functional.reset_net                     membranes start anew with the next batch
        strategy.step                            accumulates, clips, scales, updates; may skip on NaN
        ema.update
        log_step, run.save                       where --metrics-every, --save-every say so
        preemption.agreed, run.finished          all ranks end at the same step

    Returns:
        means of loss, acc1, acc5 over the images of the epoch, over all ranks.
    """
    run = trainer.run
    strategy, progress, timer = run.strategy, run.progress, run.timer
    model.train()
    run.averages = run.averages or Averages(NAMES, run.device)
    of_step = Averages(NAMES, run.device)
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, StepResult]]
    step = partial(one_step, trainer, model, criterion)
    if args.cuda_graph:
        learn = partial(forward_and_backward, trainer, model, criterion)
        if run.graph is None:
            run.graph = StepGraph(strategy, timer, lambda: run.spikes.due(progress.step + 1), step, learn)
        step = run.graph
    left = max(0, run.batches_per_epoch - progress.batch)  # below 0 where images were removed
    for images, targets in timer.data(islice(loader.epoch(epoch, progress.batch), left)):
        output_NK, loss, result = step(images, targets)

        run.hang_watch.tick()
        run.profiler.step()
        progress.batch += 1
        progress.images_seen += len(targets) * strategy.world_size
        if result.skipped:  # gradients are not finite: the batch enters no mean
            continue
        acc1, acc5 = trainer.cal_acc1_acc5(output_NK, targets)
        for averages in (run.averages, of_step):
            averages.add({"loss": loss, "acc1": acc1, "acc5": acc5}, len(targets))
        if not result.stepped:  # a micro-batch of an accumulated step
            continue
        progress.step += 1
        if run.ema is not None:
            run.ema.update(progress.step, warming_up=epoch < args.lr_warmup_epochs)
        log_step(run, of_step, result.grad_norm)
        of_step.reset()
        if run.preemption.agreed(strategy) or run.finished:
            break
        due = args.save_every and progress.step % args.save_every == 0
        if due and progress.batch < run.batches_per_epoch:  # at its end an epoch is saved anyway
            run.save()
    return run.averages.means(strategy.reduce_sum)


def one_step(
    trainer: Trainer, model: nn.Module, criterion: nn.Module, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, StepResult]:
    """Forward, backward and update: (logits [N, classes], detached; mean loss; what the update did)."""
    run = trainer.run
    learn = partial(forward_and_backward, trainer, model, criterion, images, targets)
    output_NK, loss = run.fallback.run(learn)  # again with less memory, where the first steps run out
    if run.strategy.gradients_complete:
        run.spikes.take_gradients(run.progress.step + 1, run.strategy.gradient_norms)
    with run.timer.phase("optimizer"):
        return output_NK, loss, run.strategy.step()


def forward_and_backward(
    trainer: Trainer, model: nn.Module, criterion: nn.Module, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """One batch forward and back: (logits [N, classes], detached; mean loss). Gradients are left in place."""
    run = trainer.run
    watch = run.spikes.watch(run.progress.step + 1)
    with one_value_refused(), run.timer.phase("forward"), run.strategy.autocast(), watch:
        y = model(trainer.preprocess_train_sample(run.args, images))
        output_NK = trainer.process_model_output(run.args, y)
        loss = criterion(output_NK, check_targets(run, targets, output_NK))
    with run.timer.phase("backward"):
        run.strategy.backward(loss)
        functional.reset_net(model)
    return output_NK.detach(), loss.detach()


@contextmanager
def one_value_refused() -> Iterator[None]:
    """Say what to do where a BatchNorm gets one value per channel, of which there is no variance.

    Raises:
        UserError: it does.
    """
    try:
        yield
    except ValueError as error:  # torch's, and that of scalesnn's own layers
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "a BatchNorm gets one value per channel, which has no variance: raise --batch-size, --T or "
            f"--train-crop-size ({error})"
        ) from error


def check_targets(run: Run, targets: Tensor, output_NK: Tensor) -> Tensor:
    """The targets as the loss takes them.

    Raises:
        UserError: the network has fewer outputs than the data has classes.
    """
    classes, outputs = len(run.data.classes), output_NK.shape[-1]
    if outputs < classes:
        raise UserError(
            f"the network has {outputs} outputs, but the data has {classes} classes: "
            "build it with num_classes in load_model"
        )
    return fit_targets(targets, outputs)


def log_step(run: Run, of_step: Averages, grad_norm: Tensor | float | None) -> None:
    """Show the step; every --metrics-every steps write its metrics. Only then is the device waited for."""
    step, epoch = run.progress.step, run.progress.epoch
    place = {"step": step, "epoch": epoch, "split": "train"}
    if step % run.args.metrics_every:  # the same on all ranks: what follows is collective
        run.tracker.progress({**place, **of_step.latest(), **run.data.train.stats})
        return
    record: dict[str, Any] = {
        **place,
        **of_step.means(run.strategy.reduce_sum),
        "lr": run.strategy.optimizer.param_groups[0]["lr"],
        "images_seen": run.progress.images_seen,
        **run.timer.read(),
        **run.spikes.read(),
    }
    if run.fallback.planned is not None:
        record["memory/planned_bytes"] = float(run.fallback.planned)
    if grad_norm is not None:
        record["grad_norm"] = float(grad_norm)
    run.timer.flops_per_image = run.spikes.training_flops_per_image
    run.tracker.log_step(record)
    run.tracker.progress(record)
    for warning in run.spikes.warnings():
        run.tracker.alert("spiking health", warning)


@torch.no_grad()  # not inference_mode: what ZeRO-3 gathers here stays for the next epoch's training
def evaluate(
    trainer: Trainer, model: nn.Module, criterion: nn.Module, loader: Any, device: torch.device, args: Any
) -> dict[str, float]:
    """Evaluate on every image of ``loader`` once, over all ranks together.

    Returns:
        means of loss, acc1 and acc5 over the whole set, the same for any number of ranks; of a part of it
        if a signal came (``run.interrupted``).
    """
    run = trainer.run
    model.eval()
    averages = Averages(NAMES, device)
    for images, targets in loader.epoch(0):
        with run.strategy.autocast():
            output_NK = trainer.process_model_output(
                args, model(trainer.preprocess_test_sample(args, images))
            )
            loss = criterion(output_NK, check_targets(run, targets, output_NK))
        functional.reset_net(model)
        acc1, acc5 = trainer.cal_acc1_acc5(output_NK, targets)
        averages.add({"loss": loss, "acc1": acc1, "acc5": acc5}, len(targets))
        run.hang_watch.tick()
        if run.preemption.agreed(run.strategy):
            break
    return averages.means(run.strategy.reduce_sum)
