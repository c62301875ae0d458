"""What a subclass adds in a hook is taken: names, flags, data and figures of its own; slips are refused."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from small_runs import ROOT, SMALL, environment, records, refusal, trace
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler, Subset

from scalesnn import functional, layer, neuron
from scalesnn.model import train_classify
from scalesnn.model.train_imagenet_example import SResNetTrainer

TUTORIAL = str(ROOT / "tests/training/tutorial.py")
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": ["torchrun", "--nproc_per_node=2"],
    "launch": [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2"],
}


@pytest.mark.parametrize(
    "launcher",
    [
        "python",
        pytest.param("torchrun", marks=pytest.mark.distributed),
        pytest.param("launch", marks=[pytest.mark.distributed, pytest.mark.long]),
    ],
)
def test_the_tutorial_with_its_own_optimizer_and_flag(images, tmp_path, launcher):
    port = [] if launcher == "python" else [f"--master_port={20000 + os.getpid() % 20000}"]
    line = [*LAUNCHERS[launcher], *port, TUTORIAL, *SMALL, "--opt", "adamax", "--do-something", "else"]
    result = subprocess.run(
        [*line, "--data-path", images, "--output-dir", tmp_path, "--max-steps", "2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "y_seq.shape=torch.Size([4, 1, 1000])" in result.stdout
    assert len(trace(tmp_path)) == 2
    (config,) = tmp_path.glob("*/config.yaml")
    written = yaml.safe_load(config.read_text())
    settings = written["settings"]
    assert written["world_size"] == (1 if launcher == "python" else 2)
    assert (settings["opt"], settings["do_something"]) == ("adamax", "else")
    assert config.parent.name.endswith("_T2")


class Patches(torch.utils.data.Dataset):
    """One-channel images whose class is the bright quarter."""

    classes = ("upper", "lower")

    def __len__(self):
        return 16

    def __getitem__(self, i):
        image = torch.zeros(1, 12, 12)
        image[:, 6 * (i % 2) :][:, :6] = 1
        return image, i % 2


class OwnTrainer(train_classify.Trainer):
    """Takes a model, an optimizer, a schedule, data and figures that scalesnn does not know."""

    samplers = RandomSampler, SequentialSampler
    dataset = Patches()

    def get_args_parser(self, add_help=True):
        parser = super().get_args_parser(add_help)
        parser.add_argument("--width", type=int, default=4)
        parser.set_defaults(model="two_layers")
        return parser

    def load_model(self, args, num_classes):
        assert args.model == "two_layers"
        net = nn.Sequential(
            layer.Conv2d(1, args.width, 3),
            layer.BatchNorm2d(args.width),
            neuron.IFNode(),
            layer.Flatten(),
            layer.Linear(args.width * 100, num_classes),
        )
        functional.set_step_mode(net, "m")
        return net

    def load_data(self, args):
        assert args.distributed is False
        assert (args.rank, args.world_size) == (0, 1)
        return self.dataset, self.dataset, *(sampler(self.dataset) for sampler in self.samplers)

    def preprocess_train_sample(self, args, x):
        return functional.repeat_over_time(x, 2)

    preprocess_test_sample = preprocess_train_sample

    def process_model_output(self, args, y):
        return y.mean(0)

    def set_optimizer(self, args, parameters):
        if args.opt == "Lion2":
            return torch.optim.NAdam(parameters, lr=args.lr)
        return super().set_optimizer(args, parameters)

    def set_lr_scheduler(self, args, optimizer):
        if args.lr_scheduler == "half":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        return super().set_lr_scheduler(args, optimizer)

    def get_tb_logdir_name(self, args):
        return f"my run, width {args.width}"

    def cal_acc1_acc5(self, output, target):
        return 25.0, 75

    def train(self, tmp_path, *words):
        flags = ["--device=cpu", "--wandb=disabled", "--batch-size=4", "--mixup-alpha=0", "--cutmix-alpha=0"]
        flags += ["--metrics-every=1", "--spike-metrics-every=2", "--epochs=3", "--output-dir", str(tmp_path)]
        self.main(self.get_args_parser().parse_args([*flags, *words]))


def test_everything_of_ones_own(tmp_path):
    words = ["--opt", "Lion2", "--lr-scheduler", "half", "--lr", "0.01", "--width", "6", "--workers", "0"]
    OwnTrainer().train(tmp_path, *words, "--max-steps", "6")
    rates = [r["lr"] for r in records(tmp_path, "step")]
    assert rates == pytest.approx([0.01] * 4 + [0.005] * 2)
    OwnTrainer().train(tmp_path, *words, "--resume", "latest")
    assert (tmp_path / "my run, width 6" / "config.yaml").exists()
    rates = {r["step"]: r["lr"] for r in records(tmp_path, "step")}
    assert rates[12] == pytest.approx(0.0025)
    assert {(r["acc1"], r["acc5"]) for r in records(tmp_path, "epoch")} == {(25.0, 75.0)}


def test_workers_left_at_their_default_and_a_subset(tmp_path):
    trainer = OwnTrainer()
    trainer.dataset = Subset(Patches(), range(8))
    trainer.train(tmp_path, "--max-steps", "1")
    assert len(trace(tmp_path)) == 1


def refused(capsys, trainer, tmp_path, *words):
    return refusal(capsys, trainer.train, tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--opt", "adamox"], "--opt: unknown 'adamox'"),
        (["--lr-scheduler", "third"], "--lr-scheduler: unknown 'third'"),
        (["--lr-warmup-method", "log"], "known: linear, constant"),
    ],
)
def test_what_neither_knows_is_refused_by_the_default_hook(capsys, tmp_path, words, expected):
    assert expected in refused(capsys, OwnTrainer(), tmp_path, "--workers", "0", *words)


def test_a_dataset_that_does_not_say_its_classes(capsys, tmp_path):
    trainer = OwnTrainer()
    trainer.dataset = torch.utils.data.TensorDataset(torch.zeros(8, 1, 12, 12), torch.zeros(8).long())
    assert "dataset.classes = [...]" in refused(capsys, trainer, tmp_path)


@pytest.mark.parametrize("hook", ["set_optimizer", "load_model", "load_data"])
def test_a_hook_that_returns_nothing_is_named(capsys, tmp_path, hook):
    trainer = OwnTrainer()
    setattr(trainer, hook, lambda *_: None)
    assert hook in refused(capsys, trainer, tmp_path, "--workers", "0")


def test_data_flags_are_the_hook_s_too(tmp_path):
    class OwnLoader(OwnTrainer):
        def load_data(self, args):
            assert (args.loader, args.interpolation) == ("ffcv", "lanczos")
            return super().load_data(args)

    words = ["--loader", "ffcv", "--interpolation", "lanczos", "--weights", "mine.pt", "--max-steps", "1"]
    OwnLoader().train(tmp_path, "--workers", "0", *words)


def test_names_of_default_hooks_are_refused_before_anything_is_opened(capsys, tmp_path):
    trainer = SResNetTrainer()
    trainer.load_data = lambda args: pytest.fail("opened the data")
    for words in (["--opt", "sdg"], ["--model", "resnet"], ["--surrogate", "Atan"], ["--lr-scheduler", "x"]):
        with pytest.raises(SystemExit) as stopped:
            trainer.main(
                trainer.get_args_parser().parse_args([*SMALL, *words, "--output-dir", str(tmp_path)])
            )
        assert stopped.value.code == 2
        assert words[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_subclass_tests_weights_that_it_loads_itself(capsys, tmp_path):
    OwnTrainer().train(tmp_path, "--workers", "0", "--test-only")
    assert "acc1 25.0000" in capsys.readouterr().out
