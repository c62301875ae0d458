"""A run that goes on: longer, with other settings, after a signal in its evaluation, or not at all.

Each run is a fork of this process with a small spiking net, so that it costs a second.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import SMALL, environment
from torch import nn

from scalesnn import functional, layer, neuron
from scalesnn.model.train_classify import Trainer
from scalesnn.parallel.topology import free_port
from scalesnn.training.checkpoint import newest_first
from scalesnn.training.checkpoint_index import Index


class Small(Trainer):
    """A small spiking net; ``events`` says what happens when, e.g. {"test 1": "SIGTERM"}."""

    def __init__(self, events=()):
        self.events, self.tests = dict(events), 0

    def get_args_parser(self, add_help=True):
        parser = super().get_args_parser(add_help)
        parser.add_argument("--T", type=int, default=2)
        parser.add_argument("--width", type=int, default=4)
        return parser

    def load_model(self, args, num_classes):
        net = nn.Sequential(
            layer.Conv2d(3, args.width, 3, stride=2),
            layer.BatchNorm2d(args.width),
            neuron.IFNode(),
            layer.AdaptiveAvgPool2d(1),
            layer.Flatten(),
            layer.Linear(args.width, num_classes),
        )
        functional.set_step_mode(net, "m")
        return net

    def load_data(self, args):
        data = super().load_data(args)
        self.happen("load")
        return data

    def preprocess_train_sample(self, args, x):
        return functional.repeat_over_time(x, args.T)

    preprocess_test_sample = preprocess_train_sample

    def process_model_output(self, args, y):
        return y.mean(0)

    def before_train_one_epoch(self, args, model, epoch):
        self.happen(f"train {epoch}")

    def before_test_one_epoch(self, args, model, epoch):
        self.happen(f"test {epoch}")

    def happen(self, what):
        if what in self.events:
            os.kill(os.getpid(), signal.Signals[self.events[what]])
            time.sleep(0.05)


def train(folder, *words, events=(), trainer=Small, **variables):
    """Run a training in a fork of this process; returns (exit code or -signal, what it said)."""
    log = folder / "said.txt"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.environ.update(variables)
            torch.set_num_threads(1)
            run = trainer(events)
            small = [*SMALL[:3], "--workers=0", *SMALL[4:8], *SMALL[9:], "--loader=torchvision"]
            words = [*small, "--output-dir", folder / "runs", "--spike-metrics-every=0", *words]
            run.main(run.get_args_parser().parse_args([str(word) for word in words]))
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = log.read_text()
    assert "Traceback" not in text, text
    return code, text


def ok(folder, *words, **more):
    """What a training said that went well."""
    code, text = train(folder, *words, **more)
    assert code == 0, text
    return text


def metrics(run, kind, split="train"):
    """Records of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r for r in lines if r["kind"] == kind and r["split"] == split]


def the_run(folder):
    """The only run below ``folder``."""
    (run,) = (folder / "runs").iterdir()
    return run


def saved(run):
    """The newest checkpoint's plain values."""
    return Index.read(newest_first(run / "checkpoints")[0]).plain


def difference(text):
    """The line that says which settings differ."""
    return next((line for line in text.splitlines() if "settings that differ" in line), "")


@pytest.fixture
def data(images):
    return ["--data-path", images]


def test_a_longer_run_goes_on_with_the_schedule_of_its_new_length(data, tmp_path):
    (tmp_path / "whole").mkdir()
    ok(tmp_path / "whole", *data, "--epochs", 4)
    ok(tmp_path, *data, "--epochs", 2)
    said = ok(tmp_path, *data, "--epochs", 4, "--resume", "latest")  # under the default name
    assert "epochs 4 instead of 2" in difference(said)
    assert "the schedule is made anew for 4 epochs" in difference(said)
    grown, whole = the_run(tmp_path), the_run(tmp_path / "whole")
    assert grown.name == whole.name
    assert len(grown.name) < 60
    rates = [r["lr"] for r in metrics(grown, "step")]
    assert len(rates) == 32
    assert rates[16:] == [r["lr"] for r in metrics(whole, "step")][16:]
    assert rates[16] > rates[24] > 0
    assert yaml.safe_load((grown / "config.yaml").read_text())["settings"]["epochs"] == 4


def test_settings_that_are_given_are_taken_and_the_others_stay_as_the_run_had_them(data, tmp_path):
    first = ["--lr", 0.05, "--momentum", 0.8, "--weight-decay", 0.01, "--T", 3, "--width", 6, "--seed", 5]
    ok(tmp_path, *data, "--run-name", "r", "--epochs", 2, "--label-smoothing", 0, *first)
    run = the_run(tmp_path)
    said = ok(tmp_path, "--resume", run, "--epochs", 3, "--lr", 0.02, "--weight-decay", 0.3)
    assert the_run(tmp_path) == run
    line = difference(said)
    for text in ("lr 0.02 instead of 0.05", "weight_decay 0.3 instead of 0.01", "epochs 3 instead of 2"):
        assert text in line
    kept = line.partition("since they are not given")[2]
    for text in ("T 3", "width 6", "momentum 0.8", "label_smoothing 0", "seed 5", "data_path"):
        assert text in kept
    (group,) = saved(run)["train"]["groups"]
    assert (group["options"]["weight_decay"], group["options"]["momentum"]) == (0.3, 0.8)
    assert group["options"]["initial_lr"] == 0.02
    settings = yaml.safe_load((run / "config.yaml").read_text())["settings"]
    assert (settings["lr"], settings["weight_decay"], settings["momentum"]) == (0.02, 0.3, 0.8)
    assert (settings["T"], settings["width"], settings["seed"]) == (3, 6, 5)
    assert metrics(run, "step")[-1]["lr"] == pytest.approx(0.01)  # of 0.02, half way down the cosine


def test_the_same_line_again_says_nothing_of_settings_and_changes_none(data, tmp_path):
    words = [*data, "--run-name", "r", "--epochs", 2, "--resume", "latest"]
    ok(tmp_path, *words, "--max-steps", 11)
    said = ok(tmp_path, *words)
    assert difference(said) == ""
    assert [r["step"] for r in metrics(the_run(tmp_path), "step")] == list(range(1, 17))


def test_a_finished_run_says_so_and_stays_as_it_is(data, tmp_path):
    words = [*data, "--run-name", "r", "--epochs", 1]
    ok(tmp_path, *words)
    run = the_run(tmp_path)
    files = [p for p in run.rglob("*") if p.is_file() and p.name not in ("lock", "run.json", "rank_0.log")]
    before = {p: p.read_bytes() for p in files}
    assert "is finished: 1 of 1 epochs" in ok(tmp_path, *words, "--resume", "latest")
    assert "is finished: 8 of 8 steps" in ok(tmp_path, *words, "--max-steps", 8, "--resume", run)
    assert {p: p.read_bytes() for p in before} == before
    assert the_run(tmp_path) == run


def test_only_testing_tells_its_notices_and_writes_nothing(data, tmp_path):
    ok(tmp_path, *data, "--run-name", "r", "--epochs", 2, "--T", 3)
    run = the_run(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    last = metrics(run, "epoch", "test")[-1]
    for resume in ("latest", "best", run):
        said = ok(tmp_path, *data, "--run-name", "r", "--test-only", "--resume", resume)
        assert f"scalesnn: resumed from {resume}" in said
        assert "T 3" in difference(said)
        if resume != "best":
            assert f"loss {last['loss']:.4f}, acc1 {last['acc1']:.4f}" in said
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    code, said = train(tmp_path, *data, "--run-name", "other", "--test-only", "--resume", "latest")
    assert (code, "no checkpoint in" in said) == (2, True)
    assert the_run(tmp_path) == run


def test_print_logdir_makes_and_deletes_nothing(data, tmp_path):
    ok(tmp_path, *data, "--run-name", "r", "--max-steps", 1)
    for clean, name in (([], "r-2"), (["--clean"], "r")):
        assert f"runs/{name}/tb" in ok(tmp_path, *data, "--run-name", "r", "--print-logdir", *clean)
    assert (the_run(tmp_path) / "checkpoints" / "latest").exists()


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGKILL"])
def test_an_epoch_is_saved_before_it_is_evaluated(data, tmp_path, sent):
    words = [*data, "--run-name", "r", "--epochs", 2]
    code, _ = train(tmp_path, *words, events={"test 0": sent})
    run = the_run(tmp_path)
    assert code == (-signal.SIGKILL if sent == "SIGKILL" else 128 + signal.Signals[sent])
    assert saved(run)["progress"]["step"] == 8
    assert metrics(run, "epoch", "test") == []
    assert not (run / "checkpoints" / "best").exists()
    # the evaluation that is missing is done by the process that resumes
    ok(tmp_path, *words, "--resume", "latest")
    (tmp_path / "whole").mkdir()
    ok(tmp_path / "whole", *words)
    whole = the_run(tmp_path / "whole")
    for kind, split in (("epoch", "test"), ("step", "train")):
        found, expected = ([(r["step"], r["loss"]) for r in metrics(x, kind, split)] for x in (run, whole))
        assert found == expected
    best = [(x / "checkpoints" / "best").read_text() for x in (run, whole)]
    assert best[0] == best[1]


def test_a_signal_before_the_first_step_ends_at_once(data, tmp_path):
    code, said = train(
        tmp_path, *data, "--run-name", "r", events={"load": "SIGUSR1"}, SLURM_JOB_ID="7", PATH="/"
    )
    assert code == 75, said  # no scontrol here: the batch script requeues it
    assert "ended before the first step" in said
    assert json.loads((the_run(tmp_path) / "interrupted.json").read_text())["step"] is None
    ok(tmp_path, *data, "--run-name", "r", "--max-steps", 1, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert the_run(tmp_path).name == "r"


def test_a_restarted_job_neither_cleans_nor_rewinds(data, tmp_path):
    ok(tmp_path, *data, "--run-name", "start", "--epochs", 1)
    start = tmp_path / "runs" / "start"
    for more in (["--clean"], ["--resume", start]):
        name = f"net{len(more)}"
        words = [*data, "--run-name", name, "--epochs", 4, *more]
        job = {"SLURM_JOB_ID": f"4{len(more)}"}
        assert train(tmp_path, *words, events={"train 2": "SIGKILL"}, **job)[0] == -signal.SIGKILL
        said = ok(tmp_path, *words, SLURM_RESTART_COUNT="1", **job)
        run = tmp_path / "runs" / name
        assert f"resumed from latest in {run}: epoch 2, step 16" in said
        first = 9 if more[0] == "--resume" else 1
        assert [r["step"] for r in metrics(run, "step")] == list(range(first, 33))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--gradient-accumulation", 9],
            "9 batches of 4 images (36 images), but the 32 training images are 8",
        ),
        (["--global-batch", 64], "at most 32"),
        (["--start-epoch", 3], "--start-epoch 3 leaves no epoch to train: with --epochs 3"),
        (["--start-epoch", 7], "--start-epoch 7 leaves no epoch to train"),
        (["--run-name", "a/b"], "it has a slash"),
        (["--run-name", ".."], "begins with a dot"),
        (["--run-name", ""], "it is empty"),
        (["--run-name", "x" * 300], "longer than"),
        (["--clean", "--resume", "latest"], "--clean deletes"),
        (["--resume", "nowhere"], "there is no such folder"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(data, tmp_path, words, said):
    code, text = train(tmp_path, *data, "--epochs", 3, *words)
    assert code == 2
    assert said in next(line for line in text.splitlines() if line.startswith("scalesnn: "))
    assert list((tmp_path / "runs").glob("*/checkpoints")) == []


class OwnData(Small):
    """A data set of one's own, of five images."""

    def load_data(self, args):
        class Five(torch.utils.data.Dataset):
            classes = ("a", "b")

            def __len__(self):
                return 5

            def __getitem__(self, place):
                return torch.rand(3, 24, 24), place % 2

        five = Five()
        order = torch.utils.data.RandomSampler(five), torch.utils.data.SequentialSampler(five)
        return five, five, *order


def test_fewer_images_of_one_s_own_than_a_batch(tmp_path):
    code, text = train(tmp_path, "--batch-size", 6, trainer=OwnData)
    assert code == 2
    assert "the 5 training images are fewer than one batch of 6" in text
    ok(tmp_path, "--batch-size", 5, "--max-steps", 1, trainer=OwnData)


def test_a_name_tells_apart_what_the_user_chose(tmp_path):
    from scalesnn.model.train_imagenet_example import SResNetTrainer

    trainer = SResNetTrainer()

    def name(*words):
        return trainer.get_tb_logdir_name(trainer.get_args_parser().parse_args([str(w) for w in words]))

    chosen = ["--neuron", "LIF"], ["--tau", 3], ["--surrogate", "Sigmoid"], ["--lr", 0.2], ["--T", 8]
    chosen += ["--label-smoothing", 0], ["--seed", 1], ["--sync-bn"], ["--opt", "adamw"], ["--ra-sampler"]
    names = [name(*words) for words in ([], *chosen)]
    assert len(set(names)) == len(names)
    everything = name(*(word for words in chosen for word in words), "--data-path", "/data/imagenet")
    assert len(everything) < 60
    assert everything.startswith("spiking_resnet18_imagenet_LIF_tau3_")
    # where, how long and how it is shown makes no other run
    same = ["--epochs", 3, "--output-dir", "/x", "--workers", 3, "--resume", "latest", "--wandb", "disabled"]
    assert name(*same) == name()
    assert name("--data-path", "/a/set") == name("--data-path", "/b/set") != name("--data-path", "/a/other")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "ResNet18_Weights.IMAGENET1K_V1"], "give --pretrained or --init-from FILE too"),
        (["--weights", "ResNet50_Weights.IMAGENET1K_V2", "--pretrained"], "ResNet50_Weights.IMAGENET1K_V1"),
    ],
    ids=["alone", "others"],
)
def test_weights_that_the_net_would_not_get_are_refused(data, tmp_path, words, said):
    from scalesnn.model.train_imagenet_example import SResNetTrainer

    class Big(SResNetTrainer):
        def __init__(self, _):
            pass

    code, text = train(tmp_path, *data, "--model", "spiking_resnet50", *words, trainer=Big)
    assert (code, said in text) == (2, True), text
    assert not Path(tmp_path / "runs").exists()


KILLED_ONCE = """
import os, sys
sys.path[:0] = {paths}
from test_resuming import Small
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
trainer = Small({{"train 2": "SIGKILL"}} if first else {{}})
trainer.main(trainer.get_args_parser().parse_args())
"""


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("identity", [[], ["--rdzv-id", "big run"]], ids=["process", "id"])
def test_torchrun_s_restart_neither_cleans_nor_rewinds(data, tmp_path, identity):
    here = Path(__file__).parent
    (tmp_path / "train.py").write_text(
        KILLED_ONCE.format(paths=[str(here), str(here.parent / "support"), str(here.parents[1])])
    )
    paths = [str(here), str(here.parent / "support"), str(here.parents[1])]
    words = [str(word) for word in (*data, "--run-name", "start", "--epochs", 1)]
    # from a process of its own: torch refuses to compute in a fork of one whose autograd has threads
    start = (
        f"import sys, pathlib; sys.path[:0] = {paths}; from test_resuming import ok; "
        f"ok(pathlib.Path({str(tmp_path)!r}), *{words})"
    )
    subprocess.run([sys.executable, "-c", start], env=environment(), check=True, timeout=200)
    torchrun = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())]
    for number, more in enumerate((["--clean"], ["--resume", tmp_path / "runs" / "start"])):
        words = [
            *SMALL,
            *data,
            "--run-name",
            f"net{number}",
            "--epochs",
            4,
            "--output-dir",
            tmp_path / "runs",
        ]
        # the global batch of the run that the second one begins with
        words += ["--workers=0", "--loader=torchvision", "--spike-metrics-every=0", "--batch-size=2", *more]
        line = [*torchrun, *identity, tmp_path / "train.py", *words]
        done = subprocess.run(
            [str(word) for word in line], env=environment(), capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run = tmp_path / "runs" / f"net{number}"
        assert f"resumed from latest in {run}: epoch 2" in done.stdout
        steps = [r["step"] for r in metrics(run, "step")]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert metrics(run, "epoch", "test")[-1]["epoch"] == 3
