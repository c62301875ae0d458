"""``scalesnn evaluate``: accuracy on the validation images, for one T or several."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from scalesnn.base import UserError
from scalesnn.evaluation.accuracy import Accuracy, Tally
from scalesnn.evaluation.trainer import EvaluationTrainer, prefixes_hold, steps_of
from scalesnn.evaluation.writing import check_writable, opened
from scalesnn.training.arguments import RecipeParser

__all__ = ["Evaluate", "run_words"]


class Evaluate(EvaluationTrainer):
    """Counts right answers for every T of --test-T."""

    prog = "evaluate"
    description = "Accuracy of a trained net on DIR's validation images, for one T or several."
    tally: Tally
    steps: list[int]
    logits: Tensor  # of the batch that is being evaluated: [T, N, K]
    counted: list[int]  # the Ts that the pass gives

    def get_args_parser(self, add_help: bool = True) -> RecipeParser:
        """Evaluation's flags, and those of the report."""
        parser = super().get_args_parser(add_help)
        parser.add_argument(
            "--test-T",
            type=str,
            default=None,
            metavar="T,T,…",
            help="time-steps, such as 1,2,4 (default: the run's)",
        )
        parser.add_argument(
            "--flip", action="store_true", help="the mean of the logits of each image and its mirror image"
        )
        parser.add_argument(
            "--per-class", type=str, default=None, metavar="FILE", help="write a table of classes (CSV)"
        )
        parser.add_argument("--json", type=str, default=None, metavar="FILE", help="write every figure")
        return parser

    def prepare(self, args: Any) -> None:
        """Settle the Ts, and where to write."""
        check_writable(args.per_class, "--per-class")
        check_writable(args.json, "--json")
        if args.test_T is not None:
            self.steps = steps_of(args.test_T, "--test-T")
            args.T = self.steps[-1]

    def preprocess_test_sample(self, args: Any, x: Tensor) -> Tensor:
        """With --flip, the mirror images after the images."""
        return super().preprocess_test_sample(args, torch.cat([x, x.flip(-1)]) if args.flip else x)

    def process_model_output(self, args: Any, y: Tensor) -> Tensor:
        """The mean over time; with --flip over the two images."""
        if args.flip:
            images = y.shape[1] // 2
            y = (y[:, :images] + y[:, images:]) / 2
        self.logits = y
        return super().process_model_output(args, y)

    def cal_acc1_acc5(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Training's accuracies; on the way, those of every T are counted."""
        for T in self.counted:
            self.tally.add(T, super().process_model_output(None, self.logits[:T]), target)
        return super().cal_acc1_acc5(output, target)

    def _test(self, args: Any) -> int:
        run = self.run
        self.check_classes()
        if args.test_T is None:
            self.steps = [args.T]  # of event frames it is known only now
        if self.steps[-1] > args.T:
            raise UserError(f"--test-T {args.test_T}: the frames have {args.T} time-steps")
        self.tally = Tally(self.steps, len(run.data.classes), self.device)
        together = prefixes_hold(run.strategy.module) or bool(run.data.frames_shape)
        start, means = time.monotonic(), {}
        passes = [self.steps] if together else [[T] for T in self.steps]
        for counted in passes:
            self.counted, args.T = counted, max(args.T, counted[-1]) if together else counted[-1]
            means = self.evaluate_all(args)
        found = self.tally.close(run.strategy.reduce_sum)
        if run.interrupted:
            return self.code_of_signal()
        seconds = time.monotonic() - start
        if run.strategy.is_main:
            speed = len(passes) * found[0].images / max(seconds, 1e-9)
            report(self, args, found, {**means, "images_per_s": speed})
        return 0


def report(command: Evaluate, args: Any, found: list[Accuracy], means: dict[str, float]) -> None:
    """Print the figures, and write the files that were asked for."""
    classes = list(command.run.data.classes)
    table = Table(title=escape(f"{command.weights.source}, {args.model}"))
    for column in ("T", "top-1 %", "95 % interval", "top-5 %", "right", "images"):
        table.add_column(column, justify="right")
    for accuracy in found:
        v = accuracy.as_dict()
        cells = [f"{v['acc1']:.2f}", f"{v['acc1_low']:.2f} … {v['acc1_high']:.2f}", f"{v['acc5']:.2f}"]
        table.add_row(str(accuracy.T), *cells, str(accuracy.top1), str(accuracy.images))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"loss {means['loss']:.4f} at T = {found[-1].T}; {means['images_per_s']:.1f} images/s")
    pairs = [(classes[a], classes[b], n) for a, b, n in command.tally.worst_pairs()]
    if pairs:
        console.print(f"most confused at T = {found[-1].T}:", markup=False)
    for own, other, count in pairs:
        console.print(f"  {own} taken for {other}: {count}", markup=False)
    if args.per_class:
        with opened(args.per_class, "--per-class") as file:
            write_classes(file, classes, found, command.tally)
    if args.json:
        figures = {
            "source": command.weights.source,
            **means,
            "accuracy": [accuracy.as_dict() for accuracy in found],
            "confused": [{"class": a, "taken_for": b, "images": n} for a, b, n in pairs],
        }
        with opened(args.json, "--json") as file:
            json.dump(figures, file, indent=1, ensure_ascii=False)


def write_classes(file: Any, classes: list[str], found: list[Accuracy], tally: Tally) -> None:
    """The table of classes: images, accuracy at every T, and what a class is most often taken for."""
    writer = csv.writer(file)
    writer.writerow(["class", "images", *(f"acc1_T{a.T}" for a in found), "most_often_taken_for"])
    wrong_KK = tally.confusion_KK.clone().fill_diagonal_(0)
    for number, name in enumerate(classes):
        images = found[0].of_class_K[number][0]
        shares = [100 * a.of_class_K[number][1] / images if images else "" for a in found]
        other = classes[int(wrong_KK[number].argmax())] if wrong_KK[number].any() else ""
        writer.writerow([name, images, *shares, other])


def run_words(words: Sequence[str]) -> int:
    """Do what the words of the command line say; returns the exit code."""
    return Evaluate().run_words(words)
