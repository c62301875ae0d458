"""A Trainer that only evaluates, with the loaders, strategies and loop of training."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from scalesnn.base import MemoryModule, UserError
from scalesnn.data.opening import SAMPLE
from scalesnn.evaluation.network_arguments import SOURCE
from scalesnn.evaluation.trained import build_trained, read_source, take_settings
from scalesnn.layer import Dropout
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.model.weights import Weights
from scalesnn.neuron import BaseNode
from scalesnn.training.arguments import RecipeParser
from scalesnn.training.data_identity import difference

__all__ = ["EvaluationTrainer", "prefixes_hold", "say", "steps_of"]

SHOWN = {  # of the Trainer's flags, those that matter here
    *("data_path", "batch_size", "workers", "loader", "device", "disable_amp", "val_resize_size"),
    *("val_crop_size", "interpolation", "strategy", "deepspeed_config", "fsdp_config", "model", "neuron"),
    *("tau", "surrogate", "cnf", "stem_pool", "T", "help"),
}


class EvaluationTrainer(SResNetTrainer):
    """Evaluates what ``args.source`` names; a subclass looks on, and reports when all images are done."""

    prog = "evaluate"
    description = ""
    weights: Weights

    def get_args_parser(self, add_help: bool = True) -> RecipeParser:
        """The Trainer's flags, of which help shows a few, and this command's."""
        parser = super().get_args_parser(add_help)
        parser.prog, parser.description = f"scalesnn {self.prog}", self.description
        parser.epilog = (
            "Every other flag of launch/train.py works too; what is not given is as the run had it."
        )
        for action in parser._actions:
            if action.dest not in SHOWN:
                action.help = argparse.SUPPRESS
        parser.add_argument("source", metavar="RUN|FILE", help=SOURCE)
        parser.add_argument(
            "--ema", action="store_true", help="the averaged weights (of a run with --model-ema)"
        )
        return parser

    def run_words(self, words: Sequence[str]) -> int:
        """Do what the words of the command line say; returns the exit code."""
        args = self.get_args_parser().parse_args(list(words))
        self.weights = read_source(args.source, ema=args.ema)
        take_settings(args, self.weights)
        args.test_only, args.model_ema, args.sync_bn = True, False, False
        args.global_batch, args.gradient_accumulation = None, 1
        args.train_crop_size = args.val_crop_size  # the summary shows the net at the size of an image
        if args.data_path is None:  # the images that ship with scalesnn, if it was trained on them
            if not self.weights.settings:
                raise UserError(f"{self.weights.source} does not say on which data: give --data-path DIR")
            args.data_path = str(SAMPLE)
        self.prepare(args)
        try:
            self.main(args)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def prepare(self, args: Any) -> None:
        """Check this command's flags, before data and devices are touched."""

    def load_model(self, args: Any, num_classes: int) -> nn.Module:
        """The net with its weights."""
        return build_trained(args, self.weights, num_classes)

    def check_classes(self) -> None:
        """Refuse data of other classes than the net was trained on."""
        trained, here = self.weights.classes, list(self.run.data.classes)
        if trained and trained != here:
            raise UserError(
                f"{self.weights.source} was trained on other classes than the data has: "
                f"{difference(trained, here)}"
            )

    def evaluate_all(self, args: Any) -> dict[str, float]:
        """Training's own evaluation of every image; returns its means of loss, acc1 and acc5."""
        run = self.run
        run.strategy.sync_buffers()
        network = run.strategy.evaluation_model
        self.before_test_one_epoch(args, network, 0)
        criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        values = self.evaluate(args, network, criterion, run.data.val, self.device)
        return dict(zip(("loss", "acc1", "acc5"), values, strict=True))

    def code_of_signal(self) -> int:
        """The exit code of an evaluation that a signal ended: a part of the images says nothing."""
        return 128 + (self.run.preemption.signal or signal.SIGTERM)


def steps_of(text: str, flag: str) -> list[int]:
    """Read a list of Ts: ``1,2,4`` → [1, 2, 4], ascending, each once.

    Raises:
        UserError: it is no such list.
    """
    try:
        steps = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{flag} is a list of time-steps such as 1,2,4, got {text!r}") from None
    if steps[0] < 1:
        raise UserError(f"{flag} {text}: T must be at least 1")
    return steps


def prefixes_hold(net: nn.Module) -> bool:
    """Whether the first t steps of a longer run are a run of t steps: nothing in the net looks ahead.

    A neuron with a ``multi_step_forward`` of its own may do so, and so may what is not known.
    """
    ordinary = BaseNode.multi_step_forward
    return all(
        isinstance(module, Dropout)
        or (isinstance(module, BaseNode) and type(module).multi_step_forward is ordinary)
        for module in net.modules()
        if isinstance(module, MemoryModule)
    )


def say(text: str) -> None:
    """Print a line for people, on standard error."""
    print(f"scalesnn: {text}", file=sys.stderr, flush=True)
