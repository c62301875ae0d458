"""The ready Trainer subclass of the tutorial: spiking ResNets on a folder of images.

    python -m scalesnn.model.train_imagenet_example --T 4 --model spiking_resnet18 --data-path DIR \\
        --batch-size 64 --lr 0.1 --lr-scheduler cosa --epochs 90

and on several devices ``torchrun --nproc-per-node 2 -m scalesnn.model.train_imagenet_example …``.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from scalesnn import functional, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet
from scalesnn.model.train_classify import Trainer
from scalesnn.training.arguments import RecipeParser, nearest

__all__ = ["SResNetTrainer", "build_model", "repeat_over_time"]


class SResNetTrainer(Trainer):
    """Trains the nets of ``scalesnn.model`` for ``--T`` time-steps on static images."""

    def get_args_parser(self, add_help: bool = True) -> RecipeParser:
        """The Trainer's flags and --T, --cupy."""
        parser = super().get_args_parser(add_help)
        group = parser.add_argument_group("spiking")
        group.add_argument("--T", type=int, default=4, metavar="N", help="time-steps")
        group.add_argument("--cupy", action="store_true", help="insist on the CuPy kernels (needs a GPU)")
        return parser

    def get_tb_logdir_name(self, args: Any) -> str:
        """The Trainer's name with T."""
        return super().get_tb_logdir_name(args) + f"_T{args.T}"

    def load_model(self, args: Any, num_classes: int) -> nn.Module:
        """``--model`` by name, with IF neurons, ATan surrogate and detached reset, in multi-step mode."""
        return build_model(args, num_classes)

    def preprocess_train_sample(self, args: Any, x: Tensor) -> Tensor:
        """Show the image at every time-step: [N, C, H, W] → [T, N, C, H, W]."""
        return repeat_over_time(x, args.T)

    def preprocess_test_sample(self, args: Any, x: Tensor) -> Tensor:
        """Show the image at every time-step: [N, C, H, W] → [T, N, C, H, W]."""
        return repeat_over_time(x, args.T)

    def process_model_output(self, args: Any, y: Tensor) -> Tensor:
        """The mean over time-steps: [T, N, classes] → [N, classes]."""
        return y.mean(0)


def repeat_over_time(x: Tensor, time_steps: int) -> Tensor:
    """[N, C, H, W] → [T, N, C, H, W] without a copy: the stride of T is 0, so the stem is computed once.

    A batch that has a time axis already, [N, T, C, H, W] (event frames), is only turned to [T, N, C, H, W].
    """
    if x.ndim == 5:
        return x.transpose(0, 1)
    return x.unsqueeze(0).expand(time_steps, *x.shape)


def build_model(args: Any, num_classes: int) -> nn.Module:
    """Build the network that ``--model`` names.

    Raises:
        UserError: no such network.
    """
    makers = {
        name: getattr(module, name)
        for module in (spiking_resnet, sew_resnet, ms_resnet)
        for name in module.__all__
        if re.search(r"res(net|next)\d", name)
    }
    if args.model not in makers:
        raise UserError(
            f"--model: unknown {args.model!r}{nearest(args.model, list(makers))} (known: {', '.join(makers)})"
        )
    model = makers[args.model](
        pretrained=args.pretrained,
        num_classes=1000 if args.pretrained else num_classes,
        spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
    functional.set_step_mode(model, "m")
    if args.cupy:
        functional.set_backend(model, "cupy", neuron.IFNode)
    return model


if __name__ == "__main__":
    trainer = SResNetTrainer()
    trainer.main(trainer.get_args_parser().parse_args())
