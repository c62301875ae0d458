"""The blocks of SpikingJelly's tutorial on large SNNs as its users have them: only imports are scalesnn's."""

import torch

from scalesnn import functional, neuron, surrogate
from scalesnn.model import spiking_resnet, train_classify

s_resnet18 = spiking_resnet.spiking_resnet18(
    pretrained=False, spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True
)


def show_output_shape():
    with torch.no_grad():
        x_seq = torch.rand([4, 1, 3, 224, 224])
        functional.set_step_mode(s_resnet18, "m")
        y_seq = s_resnet18(x_seq)
        print(f"y_seq.shape={y_seq.shape}")
        functional.reset_net(s_resnet18)


class MyTrainer(train_classify.Trainer):
    def set_optimizer(self, args, parameters):
        opt_name = args.opt.lower()
        if opt_name.startswith("adamax"):
            return torch.optim.Adamax(parameters, lr=args.lr, weight_decay=args.weight_decay)
        return super().set_optimizer(args, parameters)

    def get_args_parser(self, add_help=True):  # the tutorial's returns nothing
        parser = super().get_args_parser()
        parser.add_argument("--do-something", type=str, help="do something")


class SResNetTrainer(MyTrainer):
    def preprocess_train_sample(self, args, x: torch.Tensor):
        return x.unsqueeze(0).repeat(args.T, 1, 1, 1, 1)

    def preprocess_test_sample(self, args, x: torch.Tensor):
        return x.unsqueeze(0).repeat(args.T, 1, 1, 1, 1)

    def process_model_output(self, args, y: torch.Tensor):
        return y.mean(0)

    def get_args_parser(self, add_help=True):
        parser = super().get_args_parser()
        parser.add_argument("--T", type=int, help="total time-steps")
        parser.add_argument("--cupy", action="store_true", help="set the neurons to use cupy backend")
        return parser

    def get_tb_logdir_name(self, args):
        return super().get_tb_logdir_name(args) + f"_T{args.T}"

    def load_model(self, args, num_classes):
        if args.model in spiking_resnet.__all__:
            model = spiking_resnet.__dict__[args.model](
                pretrained=args.pretrained,
                spiking_neuron=neuron.IFNode,
                surrogate_function=surrogate.ATan(),
                detach_reset=True,
            )
            functional.set_step_mode(model, step_mode="m")
            if args.cupy:
                functional.set_backend(model, "cupy", neuron.IFNode)
            return model
        raise ValueError(f"args.model should be one of {spiking_resnet.__all__}")


if __name__ == "__main__":
    show_output_shape()
    trainer = SResNetTrainer()
    args = trainer.get_args_parser().parse_args()
    trainer.main(args)
