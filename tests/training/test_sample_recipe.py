"""The product's own line with nothing else trains the shipped images with their own recipe."""

import json

import pytest
import yaml

from scalesnn.configs import FOLDER, find_config
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.parallel.deepspeed_config import read_config
from scalesnn.parallel.fsdp import FSDPConfig

RECIPE = yaml.safe_load((FOLDER / "recipes/sample.yaml").read_text())


class Opens(SResNetTrainer):
    """Opens a run and does not train."""

    def _train(self, args):
        return 0


def opened(tmp_path, *words, trainer=Opens):
    """The resolved settings of a run, and its notices."""
    run = trainer()
    flags = ["--wandb", "disabled", "--device", "cpu", "--output-dir", str(tmp_path), "--run-name", "a"]
    run.main(run.get_args_parser().parse_args([*flags, *words]))
    settings = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["settings"]
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    return settings, [event["text"] for event in events if event["event"] == "notice"]


def named(notices):
    return [line for line in notices if "--config sample" in line and "minutes" in line and "top-1" in line]


def test_nothing_given_takes_the_sample_s_recipe_and_says_so(tmp_path):
    settings, notices = opened(
        tmp_path, "--lr", "0.1", "-b", "16"
    )  # as the parser's default: given all the same
    assert {name: settings[name] for name in RECIPE} == {**RECIPE, "lr": 0.1, "batch_size": 16}
    assert len(named(notices)) == 1


@pytest.mark.parametrize("given", ["data", "recipe"])
def test_data_or_a_recipe_of_ones_own_is_left_alone(tmp_path, given):
    (tmp_path / "mine.yaml").write_text("epochs: 2\n")
    data = str(FOLDER.parent / "data/sample/fashion-mnist")
    words = ["--data-path", data] if given == "data" else ["--config", str(tmp_path / "mine.yaml")]
    settings, notices = opened(tmp_path, *words)
    assert settings["train_crop_size"] == 176
    assert settings["epochs"] == (90 if given == "data" else 2)
    assert not named(notices)


def test_what_a_subclass_has_set_is_left_alone(tmp_path):
    class Subclass(Opens):
        def get_args_parser(self, add_help=True):
            parser = super().get_args_parser(add_help)
            parser.set_defaults(epochs=3, lr=0.02)
            return parser

    settings, _ = opened(tmp_path, trainer=Subclass)
    assert (settings["epochs"], settings["lr"], settings["train_crop_size"]) == (3, 0.02, 28)


def test_a_subclass_with_data_of_its_own_is_left_alone(tmp_path):
    class Subclass(Opens):
        def load_data(self, args):
            return super().load_data(args)

    settings, notices = opened(tmp_path, trainer=Subclass)
    assert settings["train_crop_size"] == 176
    assert not named(notices)


@pytest.mark.parametrize("name", ["sample", "sample.yaml", "configs/recipes/sample.yaml"])
def test_a_shipped_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()  # a folder of that name is no recipe
    assert SResNetTrainer().get_args_parser().parse_args(["--config", name]).epochs == RECIPE["epochs"]


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").write_text("epochs: 77\n")
    assert SResNetTrainer().get_args_parser().parse_args(["--config", "sample"]).epochs == 77


def test_strategies_settings_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("zero3")["zero_optimization"]["stage"] == 3
    assert read_config("configs/zero2.json")["zero_optimization"]["stage"] == 2
    assert FSDPConfig.read("hsdp").mesh == "hsdp"


@pytest.mark.parametrize(
    ("flag", "pattern", "known"),
    [
        ("--config", "recipes/*.yaml", "sample"),
        ("--deepspeed_config", "*.json", "zero2"),
        ("--fsdp-config", "[fh]sdp.yaml", "hsdp"),
    ],
)
def test_a_name_that_is_none_is_refused_with_those_that_are(tmp_path, monkeypatch, flag, pattern, known):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"{flag} sampel: no such file, and none of the shipped ones: .*{known}"
    ):
        find_config(flag, "sampel", pattern)
