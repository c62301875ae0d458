"""The ready Trainer subclass of the tutorial: spiking ResNets on a folder of images.

    python -m scalesnn.model.train_imagenet_example --T 4 --model spiking_resnet18 --data-path DIR \\
        --batch-size 64 --lr 0.1 --lr-scheduler cosa --epochs 90

and on several devices ``torchrun --nproc-per-node 2 -m scalesnn.model.train_imagenet_example …``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scalesnn import functional, neuron, surrogate
from scalesnn.base import UserError
from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet
from scalesnn.model.resnet import ARCHITECTURES, STEM_POOLS
from scalesnn.model.train_classify import Trainer
from scalesnn.training.arguments import RecipeParser
from scalesnn.training.hook_checks import check_name, refuses

__all__ = ["SResNetTrainer", "build_model", "model_makers"]

NEURONS = {"IF": neuron.IFNode, "LIF": neuron.LIFNode, "PLIF": neuron.ParametricLIFNode}


def check_network(args: Any) -> None:
    """Refuse a network that ``build_model`` cannot make.

    Raises:
        UserError: no such network, neuron or surrogate, or --cnf for a network that has none.
    """
    check_name("--model", args.model, list(model_makers()))
    if args.neuron is not None:
        check_name("--neuron", args.neuron, list(NEURONS))
    check_name("--surrogate", args.surrogate, list(surrogates()))
    check_name("--stem-pool", args.stem_pool, list(STEM_POOLS))
    others = {"--stem-pool": args.stem_pool != "max", "--zero-init-residual": args.zero_init_residual}
    for flag in (flag for flag, given in others.items() if given and args.model.startswith("ms_")):
        raise UserError(f"{flag} is for spiking and SEW nets, but --model is {args.model}: leave it out")
    if "cnf" in args.explicit and not args.model.startswith("sew_"):
        raise UserError(f"--cnf is for SEW-ResNets, but --model is {args.model}: leave it out")


def check_test(args: Any) -> None:
    """``check_network``, and the weights that a run begins with.

    Raises:
        UserError: see ``check_network``; --test-only has nothing to test; or --weights names what the
            network would not get.
    """
    check_network(args)
    begins_with = args.pretrained or args.init_from or args.resume
    if args.test_only and not begins_with:
        raise UserError(
            "--test-only needs weights to test: give --resume CHECKPOINT, --init-from FILE or --pretrained"
        )
    if args.weights is None:
        return
    if not begins_with:
        raise UserError(
            f"--weights {args.weights} sets the size of test images, but training would start from random "
            "weights: give --pretrained or --init-from FILE too, or leave --weights out"
        )
    network = args.model.partition("_")[2]
    if args.pretrained and network in ARCHITECTURES:
        import torchvision  # late: it takes two seconds

        loaded = torchvision.models.get_model_weights(network)["IMAGENET1K_V1"]
        if torchvision.models.get_weight(args.weights) is not loaded:
            raise UserError(
                f"--weights {args.weights}: --pretrained starts {args.model} from {loaded}; "
                "give that, or leave --weights out"
            )


class SResNetTrainer(Trainer):
    """Trains the nets of ``scalesnn.model`` for ``--T`` time-steps, on static images or event frames."""

    def get_args_parser(self, add_help: bool = True) -> RecipeParser:
        """The Trainer's flags and those of spiking networks."""
        parser = super().get_args_parser(add_help)
        group = parser.add_argument_group("spiking")
        group.add_argument("--T", type=int, default=4, metavar="N", help="time-steps")
        group.add_argument(
            "--in-channels",
            type=int,
            metavar="N",
            help="channels of the images or frames (default: the data's)",
        )
        group.add_argument("--cupy", action="store_true", help="insist on the CuPy kernels (needs a GPU)")
        group.add_argument(
            "--neuron",
            default=None,
            metavar="NAME",
            help=f"{', '.join(NEURONS)} (default: IF; of MS-ResNets their paper's LIF)",
        )
        group.add_argument("--tau", type=float, default=2.0, help="time constant of LIF, initial one of PLIF")
        group.add_argument("--surrogate", default="ATan", metavar="NAME", help="class of scalesnn.surrogate")
        group.add_argument("--cnf", default="ADD", metavar="NAME", help="SEW-ResNet: ADD, AND or IAND")
        group.add_argument(
            "--stem-pool", default="max", metavar="NAME", help="max, or avg as in the PSN authors' nets"
        )
        group.add_argument(
            "--zero-init-residual", action="store_true", help="begin with residual branches that add nothing"
        )
        return parser

    def get_tb_logdir_name(self, args: Any) -> str:
        """The Trainer's name with T."""
        return super().get_tb_logdir_name(args) + f"_T{args.T}"

    @refuses(check_test)
    def load_model(self, args: Any, num_classes: int) -> nn.Module:
        """``--model`` by name, with detached reset, in multi-step mode."""
        return build_model(args, num_classes)

    def preprocess_train_sample(self, args: Any, x: Tensor) -> Tensor:
        """Show the image at every time-step: [N, C, H, W] → [T, N, C, H, W], a view that takes no memory.

        Event frames, [N, T, C, H, W], have their time-steps already: → [T, N, C, H, W].
        """
        return x.transpose(0, 1) if x.ndim == 5 else functional.repeat_over_time(x, args.T)

    def preprocess_test_sample(self, args: Any, x: Tensor) -> Tensor:
        """As for training."""
        return self.preprocess_train_sample(args, x)

    def process_model_output(self, args: Any, y: Tensor) -> Tensor:
        """The mean over time-steps: [T, N, classes] → [N, classes]."""
        return y.mean(0)


def model_makers() -> dict[str, Callable[..., nn.Module]]:
    """The functions that build a network, by the name that --model takes."""
    return {
        name: getattr(module, name)
        for module in (spiking_resnet, sew_resnet, ms_resnet)
        for name in module.__all__
        if re.search(r"res(net|next)\d", name)
    }


def surrogates() -> dict[str, Callable[..., Any]]:
    """The classes that --surrogate names."""
    return {n: getattr(surrogate, n) for n in surrogate.__all__ if isinstance(getattr(surrogate, n), type)}


def build_model(args: Any, num_classes: int) -> nn.Module:
    """Build the network that the flags name.

    Raises:
        UserError: see ``check_network``; or --cupy without a GPU.
    """
    check_network(args)
    if args.cupy and not torch.cuda.is_available():
        raise UserError(
            "--cupy needs a GPU, and this run has none; leave it out: the CPU has fused kernels of its own"
        )
    settings: dict[str, Any] = {"in_channels": args.in_channels or 3}
    kind = args.neuron or "IF"
    if args.neuron is not None or not args.model.startswith("ms_"):
        settings |= {"spiking_neuron": NEURONS[kind], "detach_reset": True}
    if "spiking_neuron" in settings or "surrogate" in args.explicit:
        settings["surrogate_function"] = surrogates()[args.surrogate]()
    if kind != "IF":
        settings["tau" if kind == "LIF" else "init_tau"] = args.tau
    if not args.model.startswith("ms_"):
        settings |= {"stem_pool": args.stem_pool, "zero_init_residual": args.zero_init_residual}
    if args.model.startswith("sew_"):
        settings["cnf"] = args.cnf
    ends = num_classes, settings["in_channels"]
    if args.pretrained and args.test_only and not args.resume and ends != (1000, 3):
        raise UserError(
            "--test-only --pretrained: the weights are for 1000 classes and 3 channels, the data have "
            f"{ends[0]} and {ends[1]}: train first, and test with --resume"
        )
    model = model_makers()[args.model](pretrained=args.pretrained, num_classes=num_classes, **settings)
    functional.set_step_mode(model, "m")
    if args.cupy:
        functional.set_backend(model, "cupy", neuron.BaseNode)
    return model


if __name__ == "__main__":
    trainer = SResNetTrainer()
    trainer.main(trainer.get_args_parser().parse_args())
