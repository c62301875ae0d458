"""Bad input ends with exit code 2 and one line that names the cure, before any long work."""

import shutil

import numpy as np
import pytest
from small_runs import SMALL, refusal

from scalesnn.model.train_imagenet_example import SResNetTrainer


def refused(capsys, *words, trainer_class=SResNetTrainer):
    """Run the trainer in this process; return the one line that it ends with."""
    trainer = trainer_class()

    def run():
        trainer.main(trainer.get_args_parser().parse_args([*SMALL, *map(str, words)]))

    return refusal(capsys, run)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "spiking_resnet19"], "did you mean 'spiking_resnet18'?"),
        (["--opt", "sdg"], "did you mean 'sgd'? (known: sgd, sgd_nesterov, rmsprop, adamw)"),
        (["--test-only"], "--resume CHECKPOINT"),
        (["--lr-scheduler", "poly"], "known: step, cosa, exp"),
        (["--T", "0"], "--T must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--T", "four"], "--T: expected a whole number, got 'four'"),
        (["--cupy"], "--cupy needs a GPU"),
        (["--device", "cuda"], "no GPU"),
        (["--data-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--auto-augment", "magic"], "magic"),
        (["--loader", "quick"], "quick"),
        (["--strategy", "quick"], "quick"),
        (["--strategy", "deepspeed"], "--deepspeed_config"),
        (["--deepspeed_config", "/nowhere.json"], "/nowhere.json"),
        (["--resume", "/nowhere/step_00000001"], "/nowhere/step_00000001"),
        (["--world-size", "3"], "--world-size 3"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--weights", "ResNet18_Weights.NOPE"], "NOPE"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_impossible_flags(capsys, images, tmp_path, words, expected):
    path = ["--data-path", images] if "--data-path" not in words else []
    text = refused(capsys, "--output-dir", tmp_path / "runs", *path, *words)
    assert expected in text


def test_a_rank_that_is_no_number(capsys, images, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "1")
    text = refused(capsys, "--output-dir", tmp_path / "runs", "--data-path", images)
    assert "RANK='x' in the environment is not a whole number" in text


def test_an_empty_data_folder(capsys, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    text = refused(capsys, "--output-dir", tmp_path / "runs", "--data-path", tmp_path / "data")
    assert str(tmp_path / "data" / "train") in text


def test_a_class_that_val_lacks(capsys, images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "data")
    shutil.rmtree(copy / "val" / "dog")
    text = refused(capsys, "--output-dir", tmp_path / "runs", "--data-path", copy)
    assert "dog" in text


def test_a_broken_deepspeed_json(capsys, images, tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {')
    words = ["--data-path", images, "--deepspeed_config", tmp_path / "zero.json"]
    text = refused(capsys, "--output-dir", tmp_path / "runs", *words)
    assert "zero.json" in text


def test_a_net_with_too_few_outputs(capsys, images, tmp_path):
    class TooSmall(SResNetTrainer):
        def load_model(self, args, num_classes):
            return super().load_model(args, 2)

    trainer = TooSmall()
    words = [*SMALL, "--data-path", str(images), "--output-dir", str(tmp_path), "--spike-metrics-every", "0"]
    with pytest.raises(SystemExit) as stopped:
        trainer.main(trainer.get_args_parser().parse_args(words))
    assert stopped.value.code == 2
    assert "2 outputs, but the data has 4 classes" in capsys.readouterr().err


def test_a_net_in_single_step_mode_is_refused_with_its_cure(capsys, images, tmp_path):
    from scalesnn import functional

    class SingleStep(SResNetTrainer):
        def load_model(self, args, num_classes):
            model = super().load_model(args, num_classes)
            functional.set_step_mode(model, "s")
            return model

    trainer = SingleStep()
    words = [*SMALL, "--data-path", str(images), "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        trainer.main(trainer.get_args_parser().parse_args(words))
    assert stopped.value.code == 2
    assert "functional.set_step_mode(model, 'm')" in capsys.readouterr().err


def test_event_frames_for_a_net_of_images_are_refused_with_the_channels(capsys, tmp_path):
    for split in ("train", "val"):
        for name in ("left", "right"):
            folder = tmp_path / "frames" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                np.save(folder / f"{i}.npy", np.ones((5, 2, 24, 24), np.uint8))

    class OfImages(SResNetTrainer):
        def load_model(self, args, num_classes):
            args.in_channels = 3
            return super().load_model(args, num_classes)

    words = ["--output-dir", tmp_path / "runs", "--data-path", tmp_path / "frames"]
    assert "--T 2, but the frames have 5 time-steps" in refused(capsys, *words)
    assert "the data has 2 channels" in refused(capsys, *words, "--T", 5, trainer_class=OfImages)
