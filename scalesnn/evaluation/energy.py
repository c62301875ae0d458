"""``scalesnn energy``: operations and energy of every layer, over the whole validation set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn.evaluation.energy_costs import COSTS, Row, costs_of
from scalesnn.evaluation.energy_table import print_table, write_csv, write_latex
from scalesnn.evaluation.trainer import EvaluationTrainer, say
from scalesnn.evaluation.writing import check_writable
from scalesnn.parallel.strategy import Strategy
from scalesnn.tracking.energy import LayerWork, SynapseCounter
from scalesnn.training.arguments import RecipeParser

__all__ = ["Energy", "rows_of", "run_words"]


class Energy(EvaluationTrainer):
    """Counts synaptic operations while all images are evaluated."""

    prog = "energy"
    description = "Operations and energy of a trained net, layer by layer, over DIR's validation images."
    counter: SynapseCounter
    rows: list[Row]
    _counting: ExitStack

    def get_args_parser(self, add_help: bool = True) -> RecipeParser:
        """Evaluation's flags, and those of the table."""
        parser = super().get_args_parser(add_help)
        parser.add_argument(
            "--costs",
            type=str,
            default="fp32",
            metavar="NAME|FILE",
            help=f"pJ of an operation: {', '.join(COSTS)} (45 nm), or a YAML file with mac and ac",
        )
        parser.add_argument("--csv", type=str, default=None, metavar="FILE", help="write the table as CSV")
        parser.add_argument("--latex", type=str, default=None, metavar="FILE", help="write it as LaTeX")
        return parser

    def prepare(self, args: Any) -> None:
        """Read the costs, and see where to write."""
        check_writable(args.csv, "--csv")
        check_writable(args.latex, "--latex")
        self.costs = costs_of(args.costs)

    def preprocess_test_sample(self, args: Any, x: Tensor) -> Tensor:
        """As for training; the pass that comes next is counted."""
        self._counting = ExitStack()
        self._counting.enter_context(self.counter.count())
        return super().preprocess_test_sample(args, x)

    def process_model_output(self, args: Any, y: Tensor) -> Tensor:
        """As for training; the pass ends here."""
        self._counting.close()
        return super().process_model_output(args, y)

    def _test(self, args: Any) -> int:
        self.check_classes()
        network = self.run.strategy.module
        self.counter = SynapseCounter(network)
        means = self.evaluate_all(args)
        if self.run.interrupted:
            return self.code_of_signal()
        self.rows = rows_of(self.counter.layers(), self.run.strategy)
        if self.run.strategy.is_main:
            for name, module in network.named_modules():
                if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.Conv2d):
                    say(f"{name} is not counted: only two-dimensional convolutions and linear layers are")
            images = self.run.data.val.number_of_images
            print_table(self.rows, self.costs, f"{self.weights.source}, T = {args.T}, {images} images", means)
            if args.csv:
                write_csv(self.rows, self.costs, args.csv)
            if args.latex:
                write_latex(self.rows, self.costs, args.latex)
        return 0


def rows_of(layers: dict[str, LayerWork], strategy: Strategy) -> list[Row]:
    """What all ranks counted, for one image; collective."""
    rows = []
    for number, (name, layer) in enumerate(layers.items()):
        own = [
            layer.images,
            layer.ann_macs,
            layer.macs,
            layer.inputs,
            not layer.spiking,
            not layer.non_negative,
        ]
        sums = torch.tensor(
            [float(value) for value in own], dtype=torch.float64, device=layer.arrived_T.device
        )
        sums = torch.cat([sums, layer.operations[None], layer.arrived_T])
        images, ann_macs, macs, inputs, multiplies, negative, synops, *arrived = strategy.reduce_sum(
            sums
        ).tolist()
        fed = "spikes"
        if multiplies:  # on one rank is enough: where nothing came in, nothing is known
            fed = "values" if number == 0 or negative else "averages"
        rows.append(
            Row(
                name,
                fed,
                ann_macs / images,
                layer.steps,
                tuple(value / inputs for value in arrived),
                synops / images if fed == "spikes" else 0.0,
                once=layer.steps > 1 and macs <= ann_macs,
            )
        )
    return rows


def run_words(words: Sequence[str]) -> int:
    """Do what the words of the command line say; returns the exit code."""
    return Energy().run_words(words)
