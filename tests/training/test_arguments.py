"""The command line: recipes set defaults, flags win, errors are one line with exit code 2."""

import argparse

import pytest
import torch

from scalesnn.base import UserError
from scalesnn.training.arguments import (
    RecipeParser,
    add_model_arguments,
    add_optimization_arguments,
    add_run_arguments,
    check_arguments,
    check_weights,
    split_recipes,
)
from scalesnn.training.optimizers import make_optimizer, make_scheduler


@pytest.fixture
def parser():
    parser = RecipeParser(prog="train")
    add_model_arguments(parser)
    add_optimization_arguments(parser)
    add_run_arguments(parser)
    return parser


def recipe(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def refused(parser, capsys, *words):
    """Parse, expect exit code 2 and one line; return the line."""
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(list(words))
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    return text


def test_recipe_sets_defaults_and_flags_win_wherever_they_stand(parser, tmp_path):
    path = recipe(tmp_path, "batch_size: 7\nlr: 1e-2\nmodel_ema: true\n")
    for words in (
        ["--config", path, "--lr", "0.5"],
        ["--lr", "0.5", "--config", path],
        ["--lr=0.5", f"--config={path}"],
    ):
        args = parser.parse_args(words)
        assert (args.batch_size, args.lr, args.model_ema) == (7, 0.5, True)


def test_explicit_names_what_the_user_set(parser, tmp_path):
    path = recipe(tmp_path, "epochs: 3\n")
    args = parser.parse_args(["--config", path, "-b4", "--wd", "1e-4"])
    assert args.explicit == {"epochs", "batch_size", "weight_decay"}
    assert (args.batch_size, args.weight_decay) == (4, 1e-4)


def test_unknown_recipe_key_names_the_nearest(parser, tmp_path, capsys):
    text = refused(parser, capsys, "--config", recipe(tmp_path, "bach_size: 7\n"))
    assert "unknown setting 'bach_size'" in text
    assert "did you mean 'batch_size'?" in text


def test_unknown_flag_names_the_nearest(parser, capsys):
    assert "did you mean '--epochs'?" in refused(parser, capsys, "--epoch", "3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [\n", "not valid YAML"),
        ("- 1\n", "expected lines of the form"),
        ("batch_size: many\n", "--batch-size: expected a whole number, got 'many'"),
    ],
)
def test_broken_recipe(parser, tmp_path, capsys, text, expected):
    assert expected in refused(parser, capsys, "--config", recipe(tmp_path, text))


def test_missing_recipe(parser, tmp_path, capsys):
    assert "No such file" in refused(parser, capsys, "--config", str(tmp_path / "none.yaml"))


def test_wrong_type_of_a_flag(parser, capsys):
    assert "--epochs: expected a whole number, got 'ten'" in refused(parser, capsys, "--epochs", "ten")


def test_recipes_are_taken_out_in_order():
    assert split_recipes(["a", "--config", "x", "--config=y", "b"]) == (["x", "y"], ["a", "b"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--lr", "-1"], "--lr must be 0 or more"),
        (["--label-smoothing", "2"], "between 0 and 1"),
        (["--device", "tpu"], "expected auto, cuda or cpu"),
    ],
)
def test_impossible_settings_are_refused(parser, words, expected):
    with pytest.raises(UserError, match=expected.replace("?", r"\?")):
        check_arguments(parser.parse_args(words))


def test_defaults_are_possible(parser):
    check_arguments(parser.parse_args([]))


def test_weights_bring_their_preprocessing_but_flags_win(parser):
    from scalesnn.data import add_data_arguments

    add_data_arguments(parser)
    args = parser.parse_args(["--weights", "ResNet18_Weights.IMAGENET1K_V1", "--val-crop-size", "192"])
    check_weights(args)
    assert (args.val_resize_size, args.val_crop_size, args.interpolation) == (256, 192, "bilinear")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_name: 007\n", {"run_name": "007"}),
        ("run_name: 2024-01-31\nresume: 5\n", {"run_name": "2024-01-31", "resume": "5"}),
        ("run_name: yes\n", {"run_name": "yes"}),
        ("run_name: null\nsave_every: ~\n", {"run_name": None, "save_every": None}),
        (
            'model_ema: "false"\nclean: on\ntest_only: 1\n',
            {"model_ema": False, "clean": True, "test_only": True},
        ),
        ("lr: 1e-3\nseed: 0x10\nT: 010\n", {"lr": 0.001, "seed": 16, "T": 10}),
        ("output_dir: ~/runs\n", {"output_dir": "/home/me/runs"}),
        ("words: [a, 1]\n", {"words": ["a", "1"]}),
        ("on: false\n", {"on": False}),
        ("quiet: false\n", {"quiet": False}),
        ("run_name: café\n", {"run_name": "café"}),
        ("", {"run_name": None}),
        ("# nothing yet\n", {"run_name": None}),
    ],
)
def test_a_recipe_means_what_stands_in_it(parser, tmp_path, monkeypatch, text, expected):
    """Not what YAML makes of it: 007 is a name, off a word, ~ nothing."""
    monkeypatch.setenv("HOME", "/home/me")
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--words", nargs="*", default=[])
    parser.add_argument("--on", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--noise", dest="quiet", action="store_false")
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    args = parser.parse_args(["--config", str(path)])
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.explicit == {name for name in expected if text and expected[name] is not None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"model: {a: 1}\n", "--model: expected one value, got a map (a)"),
        (b"batch_size: [4]\n", "--batch-size: expected one value, got a list of 1"),
        (b"model_ema: maybe\n", "--model-ema: expected true or false, got 'maybe'"),
        (b"lr: 0.1\nlr: 0.2\n", "line 1: not valid YAML in UTF-8: lr stands twice"),
        (b"run_name: caf\xe9\n", "not valid YAML in UTF-8"),
        (b"epochs: 2.0\n", "--epochs: expected a whole number, got '2.0'"),
        (b"\tlr: 1\n", "line 1: not valid YAML"),
    ],
)
def test_recipes_that_no_flag_takes(parser, tmp_path, capsys, text, expected):
    (tmp_path / "recipe.yaml").write_bytes(text)
    assert expected in refused(parser, capsys, "--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", str(2**63)], "--seed must fit 64 bits, got 9223372036854775808"),
        (["--epochs", "9" * 30], "--epochs must fit 64 bits"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_numbers_that_no_machine_takes(parser, words, expected):
    with pytest.raises(UserError, match=expected):
        check_arguments(parser.parse_args(words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--opt", "sgd_nesterov", "--momentum", "0"], "--opt sgd_nesterov needs a --momentum above 0"),
        (["--lr-warmup-decay", "0"], "--lr-warmup-decay must be above 0 and at most 1, got 0.0"),
        (["--lr-scheduler", "exp", "--lr-gamma", "-1"], "--lr-gamma must be above 0 and at most 1, got -1.0"),
    ],
)
def test_rates_that_cannot_be(parser, words, expected):
    args = parser.parse_args(words)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(UserError, match=expected):
        make_scheduler(args, make_optimizer(args, weights))
    make_scheduler(
        parser.parse_args([*words, "--lr-warmup-epochs", "0", "--lr-scheduler", "cosa", "--opt", "sgd"]),
        torch.optim.SGD(weights),
    )  # not where they are not used
