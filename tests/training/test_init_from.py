"""``--init-from`` as a user types it: files, runs and names; what it leaves alone; what it refuses."""

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from small_runs import SMALL, process_left_as_it_was, refusal

from scalesnn.cli import main as command
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.training.init_from import locate, open_weights


@pytest.fixture(scope="module")
def place(images, tmp_path_factory):
    """A folder with net.safetensors (4 classes), head.pth (10 classes) and runs/first, a run of one step."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(7)
    save_file(torchvision.models.resnet18(num_classes=4).state_dict(), folder / "net.safetensors")
    torch.save({"model": torchvision.models.resnet18(num_classes=10).state_dict()}, folder / "head.pth")
    with process_left_as_it_was():
        train(images, folder, "--run-name", "first", "--max-steps", "1", "--T", "1")
    return folder


def train(images, folder, *words):
    """A run in this process, with --lr 0, so that weights stay; returns its trainer."""
    trainer = SResNetTrainer()
    line = [*SMALL, "--lr", "0", "--spike-metrics-every", "0", "--data-path", str(images)]
    line += ["--output-dir", str(folder / "runs"), *map(str, words)]
    trainer.main(trainer.get_args_parser().parse_args(line))
    return trainer


def load_state(path):
    return torch.load(path, weights_only=True)


def refused(capsys, images, folder, *words):
    return refusal(capsys, train, images, folder, *words)


def parameters(net):
    return {
        name: value
        for name, value in net.state_dict().items()
        if "running" not in name and "num_" not in name
    }


def test_a_file_is_where_a_run_begins_and_nothing_else_changes(place, images, tmp_path, capsys):
    trainer = train(images, tmp_path, "--init-from", place / "net.safetensors", "--max-steps", 1, "--T", 4)
    random = torch.get_rng_state()
    own, given = trainer.run.strategy.module.state_dict(), load_file(place / "net.safetensors")
    assert all(torch.equal(own[k], given[k]) for k in parameters(trainer.run.strategy.module))
    assert (trainer.run.progress.step, trainer.run.progress.epoch) == (1, 0)
    said = capsys.readouterr().out
    assert f"weights and buffers are from {place / 'net.safetensors'}, by --init-from" in said
    plain = train(images, tmp_path, "--max-steps", 1, "--T", 4)
    assert torch.equal(torch.get_rng_state(), random)
    states = [t.run.strategy.optimizer.state_dict()["param_groups"] for t in (trainer, plain)]
    assert states[0] == states[1]
    assert trainer.run.folder != plain.run.folder, "the weights that a run begins with are of its name"


def test_a_run_a_checkpoint_a_name_and_an_export_are_alike(place, images, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert command(["export", "runs/first", "-o", "net.pt"]) == 0
    expected = load_state("net.pt")
    for name in (
        "runs/first",
        "runs/first/checkpoints/best",
        "runs/first/checkpoints/step_00000001",
        "first",
    ):
        found = open_weights(locate(name, "runs"))
        assert found.classes == ["bee", "cat", "dog", "elk"]
        assert list(found.tensors) == list(expected)
        assert all(torch.equal(found.tensors[key], value) for key, value in expected.items())
    capsys.readouterr()
    figures = []
    for words in (["--init-from", "net.pt"], ["--resume", "runs/first"]):
        train(images, place, *words, "--test-only", "--T", "1")
        figures.append(capsys.readouterr().out.splitlines()[-1].split(", images_per_s")[0])
    assert figures[0] == figures[1]
    assert "acc1" in figures[0]


@pytest.mark.long
def test_another_head_is_told_and_not_tested(place, images, tmp_path, capsys):
    train(images, tmp_path, "--init-from", place / "head.pth", "--max-steps", 1)
    assert "a new classifier for 4 classes (theirs is for 10)" in capsys.readouterr().out
    said = refused(capsys, images, tmp_path, "--init-from", place / "head.pth", "--test-only")
    assert "a new classifier for 4 classes (theirs is for 10): train it first" in said


@pytest.mark.long
def test_other_names_of_as_many_classes_and_other_settings_are_told(place, images, tmp_path, capsys):
    state = torchvision.models.resnet18(num_classes=4).state_dict()
    about = {
        "classes": '["ant", "bee", "cat", "dog"]',
        "settings": '{"T": 8, "neuron": "PLIF", "surrogate": "ATan"}',
    }
    save_file(state, tmp_path / "net.safetensors", metadata=about)
    train(images, tmp_path, "--init-from", tmp_path / "net.safetensors", "--test-only")
    said = capsys.readouterr().out
    assert "its classes have other names" in said
    assert "they were trained with T 8, here 2, neuron PLIF, here IF\n" in said


def test_torchvision_s_weights_by_their_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    given = torchvision.models.resnet18().state_dict()
    torch.save(given, tmp_path / "hub/checkpoints/resnet18-f37072fd.pth")
    name = "ResNet18_Weights.IMAGENET1K_V1"
    assert locate(name, tmp_path) is None
    found = open_weights(name).tensors
    assert all(torch.equal(found[key], value) for key, value in given.items())


@pytest.mark.long
def test_after_a_resume_the_checkpoint_wins(place, images, tmp_path, capsys):
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), tmp_path / "net.pth")
    words = ["--run-name", "a", "--init-from", tmp_path / "net.pth"]
    first = train(images, tmp_path, *words, "--max-steps", 1)
    before = parameters(first.run.strategy.module)
    (tmp_path / "net.pth").unlink()  # a batch script says the same at every start
    capsys.readouterr()
    second = train(images, tmp_path, *words, "--resume", "latest", "--max-steps", 2)
    assert second.run.progress.step == 2
    assert all(torch.equal(v, before[k]) for k, v in parameters(second.run.strategy.module).items())
    assert (
        "net.pth is not read: the weights are those of the checkpoint of --resume" in capsys.readouterr().out
    )


def test_what_cannot_be_is_one_line(place, images, tmp_path, capsys):
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"no weights")
    net = place / "net.safetensors"
    old = {"layer1.0.conv1.module.0.weight": torch.ones(1)}
    torch.save(old, tmp_path / "old.pth")
    for words, said in (
        (["--init-from", tmp_path / "old.pth"], "published weights: see scalesnn import"),
        (["--init-from", "nowhere"], "--init-from nowhere: no such file or run, no run of that name in"),
        (["--init-from", bad], f"--init-from {bad}: damaged, or no file of weights"),
        (["--init-from", tmp_path], f"{tmp_path} holds no checkpoint"),
        (
            ["--init-from", net, "--model", "spiking_resnet34"],
            "does not fit SpikingResNet: it lacks layer1.2.",
        ),
        (["--init-from", net, "--pretrained"], "both name weights: leave one of them out"),
        (["--init-from", "No_Weights.V1"], "torchvision has no weights 'No_Weights.V1'"),
    ):
        assert said in refused(capsys, images, tmp_path, *words)
