"""Whatever stands in a recipe, a DeepSpeed JSON or a run's name: exit code 0, or 2 and one line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scalesnn.base import UserError
from scalesnn.model.train_imagenet_example import SResNetTrainer
from scalesnn.parallel.deepspeed import import_deepspeed
from scalesnn.parallel.deepspeed_config import read_config, resolve_config
from scalesnn.parallel.deepspeed_names import check_names

QUICK = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PARSER = SResNetTrainer().get_args_parser()
FLAGS = sorted({a.dest for a in PARSER._actions} - {"help", "config", "print_config"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["off", "007", "1e3", "~/x", "n" * 300, "2024-01-31", "auto", "none", "-5", "0", ".nan", "true"]
    ),
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
# What would end or leave this process as another test must not find it.
APART = {
    "preflight",
    "device",
    "print_logdir",
    "output_dir",
    "no_cpu_binding",
    "deepspeed_config",
    "clean",
    "strategy",
}
APART |= {"deepspeed", "fsdp_config", "dist_url"}


def is_one_line(error: UserError) -> None:
    assert len(str(error).splitlines()) == 1


def ends_well(capsys, tmp_path, *words):
    """Parse, check and choose the run's folder; what is printed, and the exit code."""
    capsys.readouterr()
    common = ["--print-logdir", "--device", "cpu", "--no-cpu-binding", "--output-dir", str(tmp_path / "runs")]
    trainer, code = SResNetTrainer(), 0
    try:
        trainer.main(trainer.get_args_parser().parse_args([*words, *common]))
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code in (0, 2)
    if code:
        assert len(printed.err.strip().splitlines()) == 1, printed.err
    return code, printed.out


@QUICK
@given(st.dictionaries(st.sampled_from([f for f in FLAGS if f not in APART]), VALUES, max_size=3))
@example({"run_name": 7, "loader_tune": False})
@example({"seed": 10**23})
@example({"opt": "sgd_nesterov", "momentum": 0})
@example({"lr_warmup_decay": 0})
@example({"dist_timeout": 1e300})
@example({"model": {"a": 1}})
@example({})
def test_recipes_of_any_values(capsys, tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    ends_well(capsys, tmp_path, "--config", str(path))


@QUICK
@given(st.binary(max_size=40))
@example(b"")
@example(b"run_name: caf\xe9\n")
@example(b"\xff\xfel\x00r\x00:\x00 \x001\x00")
@example(b"lr: &a [*a]")
@example(b"lr: 0.1\nlr: 0.2")
def test_recipes_of_any_bytes(capsys, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    ends_well(capsys, tmp_path, "--config", str(path))


@QUICK
@given(st.one_of(st.text(max_size=30), st.text(alphabet="./ -~n\n\\é", max_size=6)))
@example("n" * 300)
@example("é" * 130)
@example("a/b")
@example("..")
@example("")
def test_run_names_of_any_letters(capsys, tmp_path, name):
    before = set(tmp_path.iterdir())
    code, out = ends_well(capsys, tmp_path, f"--run-name={name}")
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "runs"}
    if code == 0:
        assert str(tmp_path / "runs") in out


DEEPSPEED = [
    "zero_optimization",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "torch_autocast",
    "gradient_clipping",
]
DEEPSPEED += ["train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print", "wall_clock_breakdown"]
DEEPSPEED += [
    "activation_checkpointing",
    "zero_optimisation",
    "type",
    "params",
    "stage",
    "lr",
    "betas",
    "enabled",
]
JSONS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 10**20), st.floats(), st.sampled_from(["auto", "Adam", "x"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(DEEPSPEED), inner, max_size=3)
    ),
    max_leaves=6,
)


@QUICK
@given(JSONS)
@example({"optimizer": {"type": "AdamW", "params": {"betas": "auto", "eps": "auto"}}})
@example({"zero_optimization": {"stage": {"stage": 2}}})
def test_deepspeed_jsons_of_any_values(tmp_path, config):
    import_deepspeed(verbose=False)
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config))
    args = SimpleNamespace(
        batch_size=4, lr=0.1, weight_decay=0.0, momentum=0.9, opt="sgd", lr_scheduler="cosa",
        lr_warmup_epochs=5, gradient_accumulation=1, clip_grad_norm=None, explicit=set(),
    )  # fmt: skip
    try:
        found = resolve_config(read_config(str(path)), args, 2, path="zero.json")
        check_names(found, "zero.json")
    except UserError as error:
        is_one_line(error)
    else:
        assert "auto" not in json.dumps(found)


@QUICK
@given(st.binary(max_size=30))
@example(b"")
@example("\ufeff{}".encode())
def test_deepspeed_jsons_of_any_bytes(tmp_path, text):
    path = tmp_path / "zero.json"
    path.write_bytes(text)
    try:
        assert isinstance(read_config(str(path)), dict)
    except UserError as error:
        is_one_line(error)


def test_a_deepspeed_json_that_is_too_deep(tmp_path):
    (tmp_path / "zero.json").write_text('{"a": ' * 9000)
    with pytest.raises(UserError, match="cannot be read"):
        read_config(str(tmp_path / "zero.json"))
