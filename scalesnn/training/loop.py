"""The training loop and the evaluation loop: the only places that run a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn import functional
from scalesnn.base import UserError
from scalesnn.parallel.strategy import Strategy
from scalesnn.tracking import NullTracker, SpikeMonitor, StepTimer, Tracker
from scalesnn.training.checkpoint import CheckpointManager, Progress
from scalesnn.training.ema import ModelEma
from scalesnn.training.metrics import Averages, fit_targets

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
    ema: ModelEma | None = None
    timer: StepTimer = field(default_factory=StepTimer)
    spikes: SpikeMonitor | None = None
    interruption: Any = None  # tells whether a signal asks the run to end at the next step boundary
    interrupted: bool = False
    averages: Averages | None = None  # of the epoch so far

    @property
    def finished(self) -> bool:
        """Whether --max-steps is reached."""
        return self.args.max_steps is not None and self.progress.step >= self.args.max_steps

    def check_interruption(self) -> bool:
        """Whether a signal was seen on any rank; collective, so all ranks ask after the same step."""
        if self.interruption is not None and not self.interrupted:
            self.interrupted = self.interruption.agree(self.strategy)
        return self.interrupted

    def save(self, *, is_best: bool = False) -> Path:
        """Write a checkpoint of this moment; collective."""
        averages = None
        if self.averages is not None:
            averages = self.strategy.reduce_sum(self.averages.sums.clone()).tolist()
        path = self.checkpoints.save(self.progress, extra={"averages": averages}, is_best=is_best)
        self.tracker.log_checkpoint(path)
        return path


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
        run.check_interruption, run.finished     all ranks agree

    Returns:
        means of loss, acc1, acc5 over the images of the epoch, over all ranks.
    """
    run = trainer.run
    strategy, progress, timer = run.strategy, run.progress, run.timer
    model.train()
    run.averages = run.averages or Averages(NAMES, run.device)
    of_step = Averages(NAMES, run.device)
    for images, targets in timer.data(loader.epoch(epoch, progress.batch)):
        with timer.phase("forward"), strategy.autocast():
            output_NK = trainer.process_model_output(
                args, model(trainer.preprocess_train_sample(args, images))
            )
            loss = criterion(output_NK, check_targets(run, targets, output_NK))
        with timer.phase("backward"):
            strategy.backward(loss)
            functional.reset_net(model)
        with timer.phase("optimizer"):
            result = strategy.step()

        acc1, acc5 = trainer.cal_acc1_acc5(output_NK.detach(), targets)
        for averages in (run.averages, of_step):
            averages.add({"loss": loss, "acc1": acc1, "acc5": acc5}, len(targets))
        progress.batch += 1
        if not result.stepped:  # a micro-batch of an accumulated step
            continue
        progress.step += 1
        if run.ema is not None:
            run.ema.update(progress.step, warming_up=epoch < args.lr_warmup_epochs)
        log_step(run, of_step, result.grad_norm)
        of_step.reset()
        if run.check_interruption() or run.finished:
            break
        if args.save_every and progress.step % args.save_every == 0 and progress.batch < len(loader):
            run.save()
    return run.averages.means(strategy.reduce_sum)


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
    """Write one line of metrics every --metrics-every steps; only then is the device waited for."""
    progress = run.progress
    if progress.step % run.args.metrics_every:
        return
    record: dict[str, Any] = {
        "step": progress.step,
        "epoch": progress.epoch,
        "split": "train",
        **of_step.means(run.strategy.reduce_sum),
        "lr": run.strategy.optimizer.param_groups[0]["lr"],
        "images_seen": progress.images_seen,
        **run.timer.read(),
    }
    if grad_norm is not None:
        record["grad_norm"] = float(grad_norm)
    if run.spikes is not None:
        record.update(run.spikes.read(progress.step))
    run.tracker.log_step(record)


@torch.inference_mode()
def evaluate(
    trainer: Trainer, model: nn.Module, criterion: nn.Module, loader: Any, device: torch.device, args: Any
) -> dict[str, float]:
    """Evaluate on every image of ``loader`` once, over all ranks together.

    Returns:
        means of loss, acc1 and acc5 over the whole set, the same for any number of ranks.
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
    return averages.means(run.strategy.reduce_sum)
