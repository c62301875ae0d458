"""Opening a run: its folder, its network, and all that lives as long as it does."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from scalesnn import functional
from scalesnn.base import UserError
from scalesnn.memory import Prepared
from scalesnn.memory import prepare as prepare_memory
from scalesnn.parallel.start_again import again
from scalesnn.parallel.strategy import Strategy
from scalesnn.tracking import NullTracker, SpikeMonitor, StepProfiler, StepTimer, Tracker, create_tracker
from scalesnn.tracking.reference import load_reference
from scalesnn.tracking.timer import peak_memory
from scalesnn.training.checkpoint import CheckpointManager, Progress
from scalesnn.training.data_identity import describe_data
from scalesnn.training.elastic import apply_global_batch
from scalesnn.training.ema import ModelEma, adjusted_decay
from scalesnn.training.fine_tuning import freeze, rate_factors
from scalesnn.training.hang_watch import HangWatch
from scalesnn.training.init_from import initialise
from scalesnn.training.loop import NAMES, Run
from scalesnn.training.metrics import Averages
from scalesnn.training.optimizers import parameter_groups
from scalesnn.training.out_of_memory import Fallback
from scalesnn.training.preemption import Preemption, is_restart, job_identity, job_run_name
from scalesnn.training.resuming import Resumption, saved_settings, settle
from scalesnn.training.run_config import describe_run, write_config
from scalesnn.training.run_folder import Request, RunFolder, look_up, open_folder
from scalesnn.training.run_name import check_name, settings_that_differ
from scalesnn.training.summary import sample_shape

if TYPE_CHECKING:
    from scalesnn.model.train_classify import Trainer

__all__ = [
    "FinishedRun",
    "build_model",
    "build_optimizer",
    "check_work",
    "choose_run_folder",
    "open_run",
    "set_deterministic",
    "take_settings",
    "total_steps",
]


class FinishedRun(Exception):
    """The run to be resumed has nothing left to do; the text says so to the user."""


def set_deterministic(seed: int, disable_uda: bool = False) -> None:
    """Seed every generator, and have torch use deterministic algorithms only, unless ``disable_uda``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = not disable_uda
    torch.backends.cudnn.benchmark = disable_uda
    if not disable_uda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # filling memory before use finds bugs of operators, and costs time at every step
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def choose_run_folder(trainer: Trainer, args: Any, strategy: Strategy) -> RunFolder:
    """The run's folder, chosen and locked on rank 0 for all; a job that was started again finds its own.

    For --test-only and --print-logdir it is only looked at: nothing is made, locked or deleted.

    Raises:
        UserError: on all ranks, see ``open_folder``; or a name that cannot be that of a folder.
    """
    chosen, problem = None, None
    if strategy.is_main:
        try:
            asked = request(trainer, args)
            chosen = look_up(asked) if args.test_only or args.print_logdir else open_folder(asked)
            if args.test_only and args.resume is not None and chosen.resume is None:
                raise UserError(f"--test-only --resume {args.resume}: no checkpoint in {chosen.path}")
        except UserError as error:
            problem = str(error)
    answer = (chosen.path, chosen.resume) if chosen is not None else (None, None)
    problem, (path, resume) = strategy.broadcast((problem, answer))
    if problem is not None:
        raise UserError(problem)
    return chosen or RunFolder(path, resume)


def request(trainer: Trainer, args: Any) -> Request:
    """What the command line and the environment ask of the run's folder."""
    if args.run_name is not None:
        name, source = args.run_name, "--run-name"
    elif job := job_run_name():
        name, source = job, "the job's name"
    else:
        name, source = trainer.get_tb_logdir_name(args), "get_tb_logdir_name:"
    check_name(name, source)
    return Request(
        args.output_dir,
        name,
        named=args.run_name is not None,
        resume=args.resume,
        clean=args.clean,
        settings=settings_that_differ(args, trainer.get_args_parser()),
        job=job_identity(),
        restart=is_restart(),
        again=told.folder if (told := again()) else "",
    )


def take_settings(trainer: Trainer, args: Any, chosen: RunFolder, strategy: Strategy) -> Resumption:
    """Where a run is resumed, give ``args`` its settings for the flags that are not given.

    Returns:
        what differs from the checkpoint.
    """
    args.resume = chosen.resume
    saved = {}
    if strategy.is_main and chosen.resume is not None:
        saved = saved_settings(chosen.path, chosen.resume)
    engine = strategy.name == "deepspeed"
    resumption = settle(args, strategy.broadcast(saved), engine=engine)
    if not engine and resumption.text:
        apply_global_batch(args, strategy.world_size)
        strategy.accumulation = args.gradient_accumulation or 1
        strategy.clip_grad_norm = args.clip_grad_norm or 0.0
    if strategy.is_main:
        chosen.note_settings(settings_that_differ(args, trainer.get_args_parser()))
    return resumption


def check_work(args: Any, data: Any, strategy: Strategy) -> None:
    """Refuse an epoch without a step, and a validation set without an image.

    Raises:
        UserError: with the arithmetic.
    """
    if len(data.val) == 0 or data.val.number_of_images == 0:
        raise UserError("the validation set has no images, so nothing can be evaluated")
    batches, accumulation = len(data.train), strategy.accumulation
    if args.test_only or batches >= accumulation:
        return
    images, ranks = data.train.number_of_images, strategy.world_size
    devices = f" on {ranks} devices" if ranks > 1 else ""
    if batches == 0:
        raise UserError(
            f"an epoch has no step: the {images} training images are fewer than one batch of "
            f"{args.batch_size}{devices}; give a smaller --batch-size"
        )
    raise UserError(
        f"an epoch has no step: an update takes {accumulation} batches of {args.batch_size} images{devices} "
        f"({accumulation * args.batch_size * ranks} images), but the {images} training images are {batches} "
        f"batches; give a smaller {'--global-batch' if args.global_batch else '--gradient-accumulation'}, "
        f"at most {batches * args.batch_size * ranks if args.global_batch else batches}"
    )


def build_model(trainer: Trainer, args: Any, data: Any, strategy: Strategy) -> tuple[nn.Module, Prepared]:
    """``load_model`` under its memory policy, and what that leaves for the run; refused where the network
    could not take its input.

    Raises:
        UserError: neurons in step mode 's' for a sequence [T, N, C, H, W], or another number of channels
            than the first convolution takes.
    """
    frames = getattr(data, "frames_shape", None)  # [T, C, H, W] of event frames
    shape = sample_shape(args, data)
    if frames is not None and hasattr(args, "T"):
        if "T" in getattr(args, "explicit", ()) and frames[0] != args.T:
            raise UserError(f"--T {args.T}, but the frames have {frames[0]} time-steps: leave --T out")
        args.T = frames[0]
    if hasattr(args, "in_channels"):
        if args.in_channels not in (None, shape[-3]):
            what = "event frames" if frames else "images"
            raise UserError(
                f"--in-channels {args.in_channels}, but the data are {what} of {shape[-3]} channels: "
                "leave --in-channels out"
            )
        args.in_channels = shape[-3]
    model = trainer.load_model(args, len(data.classes))
    if not isinstance(model, nn.Module):
        raise UserError(f"load_model must return the network, a torch.nn.Module, got {type(model).__name__}")
    probe = trainer.preprocess_train_sample(args, torch.zeros(1, *shape))
    if probe.ndim == 5:
        functional.check_step_mode(model, "m")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != probe.shape[-3]:
        raise UserError(
            f"the data has {probe.shape[-3]} channels, but the network's first convolution takes "
            f"{first.in_channels}: build one that fits in load_model"
        )
    notices = initialise(args, model, data.classes, strategy)
    freeze(model, args.freeze)
    rate_factors(model, args.lr_scale)
    time_steps = [probe.shape[0]] if probe.ndim == 5 else []
    prepared = prepare_memory(
        args,
        model,
        [*time_steps, args.batch_size, *probe.shape[-3:]],
        strategy.sharding,
        strategy.world_size,
        trainer.device,
    )
    prepared.notices[:0] = notices
    # scalesnn's convolutions are channels_last by themselves; torch's, in a net of the user's own, are not
    return model.to(memory_format=torch.channels_last), prepared


def build_optimizer(trainer: Trainer, args: Any, model: nn.Module) -> torch.optim.Optimizer:
    """``set_optimizer`` for the parameter groups of ``model``.

    Raises:
        UserError: the hook returned something else.
    """
    rates = {name: args.lr * factor for name, factor in rate_factors(model, args.lr_scale).items()}
    groups = parameter_groups(model, args.weight_decay, args.norm_weight_decay, rates)
    optimizer = trainer.set_optimizer(args, groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            "set_optimizer must return a torch.optim.Optimizer, "
            f"got {type(optimizer).__name__} for --opt {args.opt}"
        )
    return optimizer


def open_run(
    args: Any,
    chosen: RunFolder,
    resumption: Resumption,
    strategy: Strategy,
    data: Any,
    memory: Prepared,
    preemption: Preemption,
    watch: HangWatch,
) -> Run:
    """Open the run: restore what --resume names, then let the tracker begin.

    Raises:
        UserError: there is no such checkpoint, or it is of another model or optimizer.
        FinishedRun: on all ranks, before anything is written: no step is left.
    """
    folder = chosen.path
    global_batch = args.batch_size * strategy.world_size
    ema = None
    if args.model_ema:
        decay = adjusted_decay(
            args.model_ema_decay,
            global_batch=global_batch * strategy.accumulation,
            steps=args.model_ema_steps,
            epochs=args.epochs,
        )
        ema = ModelEma(strategy, decay, args.model_ema_steps)
    notices = [*chosen.notices, *data.notices, *memory.notices]
    if args.reference is not None and args.resume is None and not args.test_only:
        notices.append(load_reference(args.reference).notice(args.lr, global_batch * strategy.accumulation))
    told = again()
    if told is not None:
        notices.append(f"{told.said}: all ranks started again with {told.policy}")
    checkpoints = CheckpointManager(
        folder / "checkpoints",
        strategy,
        args.keep_checkpoints,
        ema=ema,
        background=args.background_checkpoints,
        notice=notices.append,
        data=describe_data(data),
    )
    extra: dict[str, Any] = {}
    progress = Progress(epoch=args.start_epoch)
    if args.resume is not None:
        progress, extra = checkpoints.load(args.resume, resumption.changed)
        where = f"{args.resume} in {folder}" if args.resume in ("latest", "best") else args.resume
        end = f"epoch {args.epochs}" if args.max_steps is None else f"step {args.max_steps}"
        goes_on = "" if args.test_only else f"; goes on to {end}"
        notices.append(f"resumed from {where}: epoch {progress.epoch}, step {progress.step}{goes_on}")
        if args.start_epoch:
            notices.append(f"--start-epoch {args.start_epoch} is not taken: the checkpoint has its own epoch")
        if resumption.text:
            notices.append(f"settings that differ between this command line and the run: {resumption.text}")
        if progress.batch and resumption.changed & {"seed", "ra_sampler", "ra_reps"}:
            notices.append(
                "the order of images is another: in this epoch, an image may come twice or not at all"
            )
    if not args.test_only:
        progress = progress.moved_to(global_batch)
        if not extra.get("unevaluated"):
            check_finished(args, folder, progress)
        preemption.check_progress(strategy, folder, progress.step)
    tracker: Tracker | NullTracker = NullTracker()
    if strategy.is_main:
        config = describe_run(
            args,
            strategy.module,
            strategy=strategy.name,
            world_size=strategy.world_size,
            data_fingerprint=getattr(data, "fingerprint", None),
        )
        if args.test_only:
            for notice in notices:
                print(f"scalesnn: {notice}", flush=True)
        else:
            write_config(folder, config)
            tracker = create_tracker(
                args,
                folder,
                config,
                resumed=progress.step > 0 or told is not None,
                total_steps=total_steps(args, len(data.train), strategy.accumulation),
                first_step=progress.step,
            )
        for notice in notices:
            tracker.notice(notice)
        watch.alert = tracker.stalled
        strategy.notice = partial(tracker.alert, "gradients are not finite")
    timer = StepTimer(
        strategy.device,
        world_size=strategy.world_size,
        time_steps=getattr(args, "T", None) or 1,
        hours_before=tracker.last("device_hours"),
    )
    timer.watch_communication(strategy.module)
    spikes = SpikeMonitor(strategy.module, args.spike_metrics_every)
    profiler = StepProfiler(
        args.profile if strategy.is_main else 0, folder / "profile", tracker.notice, strategy.device
    )
    fallback = Fallback(
        strategy.module,
        getattr(args, "T", None),
        strategy.together,
        tracker.notice,
        memory.table,
        memory.planned_bytes,
        lambda: peak_memory(strategy.device)["memory/peak_bytes"],
        held_by="--compile" if args.compile else None,
    )
    run = Run(
        args,
        folder,
        strategy.device,
        strategy,
        data,
        tracker,
        checkpoints,
        progress,
        timer,
        spikes,
        profiler,
        fallback,
        preemption,
        watch,
        resumption.settings,
        ema,
    )
    run.unevaluated = extra.get("unevaluated")
    if args.resume is not None and run.unevaluated:
        run.saved, run.saved_progress = checkpoints.loaded, replace(progress)
    if extra.get("averages"):
        run.averages = Averages(NAMES, strategy.device)
        if strategy.is_main:  # the sums of all ranks, counted once
            run.averages.restore(extra["averages"])
    return run


def check_finished(args: Any, folder: Path, progress: Progress) -> None:
    """Raise FinishedRun if --epochs or --max-steps is reached."""
    if args.max_steps is not None and progress.step >= args.max_steps:
        done, flag = f"{progress.step} of {args.max_steps} steps", "--max-steps"
    elif progress.epoch >= args.epochs:
        done, flag = f"{progress.epoch} of {args.epochs} epochs", "--epochs"
    else:
        return
    raise FinishedRun(f"{folder} is finished: {done}. Nothing was changed; a larger {flag} goes on with it")


def total_steps(args: Any, batches: int, accumulation: int) -> int:
    """Optimizer steps of the whole run."""
    steps = (args.epochs - args.start_epoch) * (batches // accumulation)
    return min(steps, args.max_steps) if args.max_steps else steps
