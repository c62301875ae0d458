"""The Trainer that users subclass: SpikingJelly's hooks, every strategy, and runs that cannot be lost.

``python -m scalesnn.model.train_classify -h`` prints every flag. The hooks keep the names and arguments of
SpikingJelly's ``train_classify.Trainer`` (0.0.0.0.14), which follows torchvision's reference training.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scalesnn.base import UserError
from scalesnn.data import add_data_arguments, open_data, recipe_of
from scalesnn.doctor import add_preflight_argument, run_preflight
from scalesnn.memory import add_memory_arguments, keep_freed_blocks
from scalesnn.parallel import NonFiniteLossError, add_parallel_arguments, create_strategy
from scalesnn.parallel.placement import add_placement_arguments, place_process
from scalesnn.parallel.start_again import StartAgain, again, remember_start
from scalesnn.parallel.topology import Topology
from scalesnn.tracking import add_tracking_arguments
from scalesnn.training import loop
from scalesnn.training.arguments import (
    RecipeParser,
    add_model_arguments,
    add_optimization_arguments,
    add_run_arguments,
    check_arguments,
    check_weights,
)
from scalesnn.training.compiling import check_compile, compile_network
from scalesnn.training.elastic import add_elastic_arguments, apply_global_batch
from scalesnn.training.ema import ModelEma
from scalesnn.training.hang_watch import HangWatch, add_hang_arguments
from scalesnn.training.hook_checks import check_hooks, check_optimizer, check_schedule, refuses, uses_default
from scalesnn.training.loop import Run
from scalesnn.training.metrics import accuracy
from scalesnn.training.numerics import set_tf32
from scalesnn.training.opening import (
    FinishedRun,
    build_model,
    build_optimizer,
    check_work,
    choose_run_folder,
    open_run,
    set_deterministic,
    take_settings,
)
from scalesnn.training.optimizers import make_optimizer, make_scheduler
from scalesnn.training.preemption import Preemption, StoppedBySignalError, add_preemption_arguments
from scalesnn.training.random_state import random_state, restore_random_state
from scalesnn.training.rank_logs import RankLog
from scalesnn.training.run_name import default_name
from scalesnn.training.sample_recipe import take_sample_recipe
from scalesnn.training.step_graph import check_cuda_graph, check_fused
from scalesnn.training.summary import introduce
from scalesnn.training.user_data import as_data

if TYPE_CHECKING:
    from scalesnn.parallel.strategy import Strategy
    from scalesnn.training.run_folder import RunFolder

__all__ = ["Trainer", "set_deterministic"]


def check_data(args: Any) -> None:
    """Refuse flags that the default ``load_data`` cannot take; ``--weights`` sets the test images' size.

    Raises:
        UserError: one line that names the flag, what was given and what is possible.
    """
    check_weights(args)
    recipe_of(args, args.batch_size)


def returning_parser(hook: Callable[..., RecipeParser | None]) -> Callable[..., RecipeParser]:
    """A ``get_args_parser`` that may end without ``return parser``, as in SpikingJelly's tutorial."""

    @functools.wraps(hook)
    def get_args_parser(self: Trainer, *args: Any, **kwargs: Any) -> RecipeParser:
        return hook(self, *args, **kwargs) or self._parser

    return get_args_parser


class Trainer:
    """Trains an image classifier: override the hooks, then call ``main`` with the parsed arguments.

    A subclass for spiking nets repeats the images T times in ``preprocess_*``, takes the mean over time in
    ``process_model_output`` and builds its network in ``load_model``; see
    :mod:`scalesnn.model.train_imagenet_example`. During ``main``, ``self.run`` holds the run's parts.
    """

    run: Run
    topology: Topology
    device: torch.device
    _parser: RecipeParser  # the last that get_args_parser has made

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "get_args_parser" in vars(cls):
            cls.get_args_parser = returning_parser(cls.get_args_parser)  # type: ignore[method-assign]

    # ---- hooks, in the order in which a run calls them: settings, data, network, steps, epochs ----

    def get_args_parser(self, add_help: bool = True) -> RecipeParser:
        """The parser of every flag; extend what ``super().get_args_parser()`` returns."""
        parser = self._parser = RecipeParser(
            description="Train a spiking image classifier.", add_help=add_help
        )
        add_model_arguments(parser)
        add_data_arguments(parser)
        add_optimization_arguments(parser)
        add_memory_arguments(parser)
        add_parallel_arguments(parser)
        add_elastic_arguments(parser)
        add_run_arguments(parser)
        add_preemption_arguments(parser)
        add_hang_arguments(parser)
        add_preflight_argument(parser)
        add_placement_arguments(parser)
        add_tracking_arguments(parser)
        return parser

    def load_model(self, args: Any, num_classes: int) -> nn.Module:
        """Build the network. Must be overridden."""
        raise UserError("this Trainer has no network: override load_model(self, args, num_classes)")

    @refuses(check_data)
    def load_data(self, args: Any) -> Any:
        """Open the data: ``scalesnn.data.Data``, or (dataset, dataset_test, train_sampler, test_sampler)."""
        check_data(args)
        return open_data(
            args,
            batch_size=args.batch_size,
            seed=args.seed,
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            device=self.device,
            dtype=torch.float32,
        )

    def preprocess_train_sample(self, args: Any, x: Tensor) -> Tensor:
        """What the network gets for training images [N, C, H, W]."""
        return x

    def preprocess_test_sample(self, args: Any, x: Tensor) -> Tensor:
        """What the network gets for test images [N, C, H, W]."""
        return x

    def process_model_output(self, args: Any, y: Tensor) -> Tensor:
        """From the network's output to logits [N, classes]."""
        return y

    @refuses(check_optimizer)
    def set_optimizer(self, args: Any, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The optimizer of ``--opt`` for ``parameters`` (tensors or groups)."""
        return make_optimizer(args, parameters)

    @refuses(check_schedule)
    def set_lr_scheduler(self, args: Any, optimizer: torch.optim.Optimizer) -> Any:
        """The schedule of ``--lr-scheduler``, stepped once an epoch."""
        return make_scheduler(args, optimizer)

    def cal_acc1_acc5(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Top-1 and top-5 accuracy in per cent, as scalar tensors."""
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        return acc1, acc5

    def before_train_one_epoch(self, args: Any, model: nn.Module, epoch: int) -> None:
        """Called before an epoch of training."""

    def before_test_one_epoch(self, args: Any, model: nn.Module, epoch: int) -> None:
        """Called before an evaluation."""

    def get_tb_logdir_name(self, args: Any) -> str:
        """The name of the run's folder: model, what differs from the defaults, and a hash of all of it."""
        return default_name(args, self.get_args_parser())

    def train_one_epoch(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Any,
        device: torch.device,
        epoch: int,
        args: Any,
        model_ema: ModelEma | None = None,
        scaler: Any = None,
    ) -> tuple[float, float, float]:
        """Train for one epoch (or the rest of one, after a resume).

        Returns:
            mean loss, top-1 and top-5 over the epoch's images on all ranks.
        """
        means = loop.train_one_epoch(self, model, criterion, data_loader, epoch, args)
        return means["loss"], means["acc1"], means["acc5"]

    def evaluate(
        self,
        args: Any,
        model: nn.Module,
        criterion: nn.Module,
        data_loader: Any,
        device: torch.device,
        log_suffix: str = "",
    ) -> tuple[float, float, float]:
        """Evaluate on every test image once.

        Returns:
            mean loss, top-1 and top-5 on all ranks together.
        """
        means = loop.evaluate(self, model, criterion, data_loader, device, args)
        return means["loss"], means["acc1"], means["acc5"]

    # ---- the run ----

    def main(self, args: Any) -> None:
        """Do what the command line says; bad input ends with one line and exit code 2."""
        remember_start()
        try:
            self._main(args)
        except UserError as error:
            said = os.environ.get("RANK", "0")
            rank = int(said) if said.isdigit() else 0
            if rank:  # every rank finds the same fault: rank 0 says it, unless only this rank has it
                time.sleep(5)
            print(f"scalesnn: {f'[rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except NonFiniteLossError as error:
            if self.run.strategy.is_main:
                latest = self.run.checkpoints.latest()
                saved = f"; go on from {latest}, written before it" if latest else ""
                print(f"scalesnn: {error}{saved} (--on-nan skip leaves such steps out)", file=sys.stderr)
            self.run.strategy.close()
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except StartAgain as all_ranks:
            all_ranks.execute()

    def _main(self, args: Any) -> None:
        """The stages of a run, each with what the ones before it made."""
        said: list[str] = []
        if not (args.data_path or getattr(args, "config", None)) and uses_default(self.load_data):
            said = take_sample_recipe(args, vars(Trainer().get_args_parser().get_defaults()))
        if told := again():  # a rank ran out of memory in the first steps
            args.activation_checkpoint, args.memory_budget = told.policy, "auto"
        check_arguments(args)
        check_hooks(self, args)
        set_deterministic(args.seed, args.disable_uda)
        set_tf32(args.tf32)
        self.topology = Topology.from_environment(local_rank_flag=args.local_rank)
        place_process(self.topology, bind=not args.no_cpu_binding)
        apply_global_batch(args, self.topology.world_size)
        strategy = create_strategy(args, self.topology)
        args.distributed, args.world_size = self.topology.world_size > 1, self.topology.world_size
        args.rank, args.gpu = self.topology.rank, self.topology.local_rank  # SpikingJelly's hooks read these
        self.device = strategy.setup_device(args.device)
        check_compile(args, strategy)
        check_cuda_graph(args, strategy)
        if self.device.type == "cpu":
            keep_freed_blocks(frugal=args.activation_checkpoint != "none")
        if args.preflight:
            run_preflight(args, self.topology, strategy.store)
        with ExitStack() as stack:
            chosen = choose_run_folder(self, args, strategy)
            folder = chosen.path
            if chosen.lock is not None:
                stack.callback(chosen.lock.release)
            if args.print_logdir:
                if strategy.is_main:
                    print(folder / "tb", folder / "checkpoints", sep="\n")
                return
            if not args.test_only:
                stack.enter_context(RankLog(folder, strategy.rank))
            preemption = Preemption(max_requeues=args.max_requeues, requeue=not args.no_requeue)
            stack.enter_context(preemption)
            if strategy.together is not None:
                strategy.together.folder = str(folder)
            try:
                with preemption.at_once():
                    self._open(args, chosen, strategy, preemption, stack, said)
            except StoppedBySignalError:  # the other ranks may be anywhere: nothing collective from here on
                raise SystemExit(preemption.finish(strategy, folder, None)) from None
            except FinishedRun as finished:
                if strategy.is_main:
                    print(f"scalesnn: {finished}", flush=True)
                code = 0
            else:
                try:
                    code = self._test(args) if args.test_only else self._train(args)
                except StartAgain:
                    self.run.tracker.close({"state": "starts again"})
                    raise
        strategy.close()
        if code:
            raise SystemExit(code)

    def _open(
        self,
        args: Any,
        chosen: RunFolder,
        strategy: Strategy,
        preemption: Preemption,
        stack: ExitStack,
        said: list[str],
    ) -> None:
        """Open data, network and run; ``stack`` closes them. ``said``: notices of the shipped images."""
        resumption = take_settings(self, args, chosen, strategy)
        check_cuda_graph(args, strategy)  # a resumed run may accumulate
        watch = HangWatch(args.hang_timeout, chosen.path, strategy.rank, strategy.world_size)
        data = as_data(self.load_data(args), args, self.device)
        stack.callback(data.close)
        data.notices.extend(said if args.resume is None else [])
        check_work(args, data, strategy)
        model, memory = build_model(self, args, data, strategy)
        introduce(self, args, chosen.path, data, model, strategy)
        compile_network(args, model)
        strategy.prepare(
            model,
            lambda network: build_optimizer(self, args, network),
            lambda optimizer: self.set_lr_scheduler(args, optimizer),
        )
        if args.cuda_graph:
            check_fused(strategy.optimizer)
        self.run = open_run(args, chosen, resumption, strategy, data, memory, preemption, watch)
        stack.callback(self.run.tracker.close, {"state": "failed"})  # unless it is closed by then
        stack.callback(self.run.profiler.close)
        stack.enter_context(watch)

    def _train(self, args: Any) -> int:
        """Epoch after epoch until --epochs, --max-steps or a signal; returns the exit code."""
        run, strategy = self.run, self.run.strategy
        criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        progress, train = run.progress, run.data.train
        if run.unevaluated:  # the process before was stopped between saving and evaluating
            self._evaluate_saved(args, criterion)
        while progress.epoch < args.epochs and not run.finished and not run.interrupted:
            epoch, steps_before = progress.epoch, progress.step
            self.before_train_one_epoch(args, strategy.model, epoch)
            train.set_epoch(epoch)
            loss, acc1, acc5 = self.train_one_epoch(
                strategy.model, criterion, strategy.optimizer, train, self.device, epoch, args, run.ema
            )
            resumed_at_the_end = progress.batch >= run.batches_per_epoch  # saved after an epoch's last batch
            if progress.step == steps_before and not resumed_at_the_end:
                # a user's own train_one_epoch, which keeps no account
                progress.step, progress.batch = steps_before + len(train), run.batches_per_epoch
            if run.interrupted:
                break
            if progress.batch >= run.batches_per_epoch:
                if strategy.scheduler is not None:
                    strategy.scheduler.step()
                progress.epoch, progress.batch, run.averages = epoch + 1, 0, None
            record = {"step": progress.step, "epoch": epoch}
            run.tracker.log_epoch({**record, "split": "train", "loss": loss, "acc1": acc1, "acc5": acc5})
            run.unevaluated = record
            run.save()
            self._evaluate_saved(args, criterion)
        if run.interrupted:
            path = run.save()
            run.checkpoints.wait()
            run.tracker.notice(
                f"stopped by a signal at step {progress.step}; go on with --resume latest (or {path})"
            )
        run.checkpoints.wait()
        run.tracker.close(self._summary())
        # last: once it is asked for a restart, Slurm leaves the job only seconds
        return run.preemption.finish(strategy, run.folder, progress.step)

    def _summary(self) -> dict[str, Any]:
        """What the user should know at the end."""
        run = self.run
        best = run.checkpoints.best()
        summary = {"run": run.folder, "epochs": run.progress.epoch, "steps": run.progress.step}
        summary["state"] = "preempted" if run.interrupted else "finished"
        if best is not None:
            summary.update(best_acc1=run.progress.best_acc1, best_checkpoint=best)
        if replaced := run.data.train.stats.get("replaced_images"):
            summary["replaced_images"] = replaced
        return {**summary, "latest_checkpoint": run.checkpoints.latest()}

    def _evaluate_saved(self, args: Any, criterion: nn.Module) -> None:
        """Evaluate what was saved last, and mark it; after a signal the process that resumes does so."""
        run, progress = self.run, self.run.progress
        assert run.unevaluated is not None
        numbers = random_state()  # a run trains alike, whether its evaluations were cut short or not
        accuracies = self._evaluate_epoch(args, criterion, run.unevaluated)
        restore_random_state(numbers)
        if accuracies is None:
            return
        best = accuracies[0] > progress.best_acc1
        progress.best_acc1 = max(accuracies[0], progress.best_acc1)
        progress.best_ema_acc1 = max(accuracies[1], progress.best_ema_acc1)
        run.mark(is_best=best)

    def _evaluate_epoch(
        self, args: Any, criterion: nn.Module, record: dict[str, Any]
    ) -> tuple[float, float] | None:
        """Top-1 of the weights, and of their average if one is kept (else 0); None if a signal came."""
        run = self.run
        run.strategy.sync_buffers()
        acc1 = self._evaluate_weights(args, criterion, {**record, "split": "test"})
        ema_acc1 = 0.0
        if run.ema is not None and not run.interrupted:
            with run.ema.applied():
                ema_acc1 = self._evaluate_weights(args, criterion, {**record, "split": "ema_test"})
        return None if run.interrupted else (acc1, ema_acc1)

    def _evaluate_weights(self, args: Any, criterion: nn.Module, record: dict[str, Any]) -> float:
        """Evaluate what the network holds now and log it, unless a signal comes; returns top-1."""
        run, network = self.run, self.run.strategy.evaluation_model
        self.before_test_one_epoch(args, network, record["epoch"])
        suffix = "EMA" if record["split"] == "ema_test" else ""
        start = time.monotonic()
        loss, acc1, acc5 = self.evaluate(args, network, criterion, run.data.val, self.device, suffix)
        if run.interrupted:  # a part of the images says nothing
            return acc1
        speed = run.data.val.number_of_images / max(time.monotonic() - start, 1e-9)
        values = {"loss": loss, "acc1": acc1, "acc5": acc5, "images_per_s": speed}
        run.tracker.log_epoch({**record, **values})
        if args.test_only and run.strategy.is_main:
            print(", ".join(f"{suffix}{name} {value:.4f}" for name, value in values.items()))
        return acc1

    def _test(self, args: Any) -> int:
        """--test-only: evaluate, and print the figures."""
        criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        self._evaluate_epoch(
            args, criterion, {"epoch": self.run.progress.epoch, "step": self.run.progress.step}
        )
        return 128 + (self.run.preemption.signal or signal.SIGTERM) if self.run.interrupted else 0


if __name__ == "__main__":
    trainer = Trainer()
    trainer.main(trainer.get_args_parser().parse_args())
