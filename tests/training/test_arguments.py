"""The command line: recipes set defaults, flags win, errors are one line with exit code 2."""

import pytest

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
