"""The flags of parallel training, DeepSpeed's JSON and FSDP2's YAML: agreement, or one clear line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from scalesnn.base import UserError
from scalesnn.parallel import Topology, add_parallel_arguments, create_strategy
from scalesnn.parallel.arguments import choose_strategy
from scalesnn.parallel.deepspeed_config import read_config, resolve_config
from scalesnn.parallel.fsdp import FSDPConfig, residual_blocks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TWO = Topology(world_size=2, local_world_size=2, source="torchrun")


def parse(*words: str, **settings: Any) -> argparse.Namespace:
    """The parallel flags, and those of others that DeepSpeed's JSON can set; ``settings`` count as given."""
    parser = argparse.ArgumentParser()
    add_parallel_arguments(parser)
    args = parser.parse_args(words)
    defaults = {"batch_size": 32, "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "opt": "sgd"}
    defaults |= {"lr_scheduler": "cosa", "lr_warmup_epochs": 5}
    for name, value in {**defaults, **settings}.items():
        setattr(args, name, value)
    args.explicit = set(settings)
    return args


def resolve(
    config: dict[str, Any], args: argparse.Namespace | None = None, world_size: int = 2
) -> dict[str, Any]:
    return resolve_config(config, args or parse(), world_size, path="x.json")


@pytest.mark.parametrize(
    ("words", "topology", "expected"),
    [
        ([], Topology(), "single"),
        ([], TWO, "ddp"),
        (["--deepspeed_config", "x.json"], TWO, "deepspeed"),
        (["--deepspeed-config", "x.json", "--deepspeed"], Topology(), "deepspeed"),
        (["--fsdp-config", "x.yaml"], TWO, "fsdp"),
        (["--strategy", "fsdp"], TWO, "fsdp"),
        (["--strategy", "ddp"], Topology(), "ddp"),
    ],
)
def test_strategy_is_chosen_from_flags(words: list[str], topology: Topology, expected: str) -> None:
    assert choose_strategy(parse(*words), topology) == expected


@pytest.mark.parametrize(
    ("words", "topology", "expected"),
    [
        (["--strategy", "horovod"], TWO, "--strategy: unknown 'horovod' (known: auto, single, ddp"),
        (["--strategy", "deepspeed"], TWO, "DeepSpeed needs --deepspeed_config JSON"),
        (["--deepspeed"], TWO, "DeepSpeed needs --deepspeed_config JSON"),
        (["--strategy", "ddp", "--deepspeed_config", "x"], TWO, "--deepspeed_config asks for deepspeed, but"),
        (["--fsdp-config", "x", "--deepspeed_config", "y"], TWO, "ask for two strategies"),
        (["--strategy", "single"], TWO, "--strategy single is for one process, but 2 were started"),
        (["--world-size", "4"], TWO, "--world-size 4, but 2 process(es) were started (by torchrun)"),
        (["--gradient-accumulation", "0"], TWO, "--gradient-accumulation must be at least 1, got 0"),
        (["--clip-grad-norm", "-1"], TWO, "--clip-grad-norm must be 0 or more, got -1"),
        (["--clip-grad-norm", "nan"], TWO, "--clip-grad-norm must be 0 or more, got nan"),
        (["--on-nan", "panic"], TWO, "--on-nan must be stop or skip, got 'panic'"),
        (["--strategy", "fsdp", "--ddp-static-graph"], TWO, "--ddp-static-graph is for --strategy ddp"),
        (["--deepspeed_config", "/nowhere/x.json"], TWO, "--deepspeed_config /nowhere/x.json: No such file"),
        (["--fsdp-config", "/nowhere/x.yaml"], TWO, "--fsdp-config /nowhere/x.yaml: No such file"),
    ],
)
def test_contradictions_are_one_line(words: list[str], topology: Topology, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        create_strategy(parse(*words), topology)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_clipping_is_always_written_out() -> None:
    # Left unset, DeepSpeed 0.19 clips at norm 1.0.
    assert resolve({})["gradient_clipping"] == 0.0
    assert resolve({}, parse(clip_grad_norm=2.5))["gradient_clipping"] == 2.5
    assert resolve({"gradient_clipping": "auto"})["gradient_clipping"] == 0.0
    args = parse()
    assert resolve({"gradient_clipping": 1.5}, args)["gradient_clipping"] == 1.5
    assert args.clip_grad_norm == 1.5


@pytest.mark.parametrize("value", ["auto", None])
def test_auto_takes_the_flag(value: Any) -> None:
    config = {"train_micro_batch_size_per_gpu": value} if value else {}
    found = resolve(config, parse(batch_size=24, gradient_accumulation=3))
    assert found["train_micro_batch_size_per_gpu"] == 24
    assert found["train_batch_size"] == 24 * 3 * 2


def test_value_of_the_json_reaches_the_flags_left_at_their_defaults() -> None:
    args = parse()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": "auto"}},
    }
    found = resolve(config, args)
    assert (args.batch_size, args.gradient_accumulation, args.lr) == (8, 4, 0.003)
    assert found["train_batch_size"] == 64
    assert found["optimizer"]["params"]["weight_decay"] == 0.0
    assert config["optimizer"]["params"]["weight_decay"] == "auto", "the caller's dictionary was changed"


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, {"batch_size": 16}, ("8", "--batch-size says 16")),
        (
            {"gradient_accumulation_steps": 2},
            {"gradient_accumulation": 4},
            ("2", "--gradient-accumulation says 4"),
        ),
        ({"gradient_clipping": 1.0}, {"clip_grad_norm": 5.0}, ("1.0", "--clip-grad-norm says 5.0")),
        ({"optimizer": {"params": {"lr": 0.01}}}, {"lr": 0.2}, ("0.01", "--lr says 0.2")),
        ({"train_batch_size": 100}, {"batch_size": 16}, ("100", "is 32")),
        ({"optimizer": {"type": "Adam"}}, {"opt": "sgd"}, ("optimizer", "--opt sgd was given")),
        ({"scheduler": {"type": "WarmupLR"}}, {"lr_scheduler": "step"}, ("scheduler", "--lr-scheduler step")),
    ],
)
def test_disagreement_shows_both_values(
    config: dict[str, Any], given: dict[str, Any], expected: tuple[str, str]
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(config, parse(**given))
    assert all(text in str(caught.value) for text in ("x.json", *expected)), caught.value


def test_same_value_in_both_is_fine() -> None:
    assert resolve({"train_micro_batch_size_per_gpu": 16}, parse(batch_size=16))["train_batch_size"] == 32


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bf16": {"enabled": True}}, "torch_autocast"),
        ({"fp16": {"enabled": True}}, "torch_autocast"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, 'write "bfloat16"'),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": 2}, "must be 0, 1, 2 or 3, got 2"),
        ({"train_micro_batch_size_per_gpu": 0}, "at least 1, got 0"),
        ({"train_micro_batch_size_per_gpu": "many"}, 'must be a number or "auto", got "many"'),
        ({"train_micro_batch_size_per_gpu": True}, 'must be a number or "auto", got true'),
    ],
)
def test_json_that_cannot_work_is_refused(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(config)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,\n}', "line 2: not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("", "not valid JSON"),
    ],
)
def test_broken_json_names_file_and_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(str(path))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("zero*.json")), ids=lambda path: path.stem)
def test_shipped_json_resolves(path: Path) -> None:
    found = resolve(read_config(str(path)), parse(batch_size=4))
    assert found["train_batch_size"] == 8
    assert path.stem.startswith(f"zero{found['zero_optimization']['stage']}")
    json.dumps(found)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*sdp.yaml")), ids=lambda path: path.stem)
def test_shipped_yaml_is_read(path: Path) -> None:
    assert FSDPConfig.read(str(path)).mesh == path.stem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reshard: true", "unknown setting 'reshard'"),
        ("cpu_offlaod: true", "did you mean 'cpu_offload'?"),
        ("mesh: ring", "mesh must be one of fsdp, hsdp, got 'ring'"),
        ("reshard_after_forward: 1", "reshard_after_forward must be one of true, false, got 1"),
        ("replicas: 0", "replicas must be auto or at least 1, got 0"),
        ("param_dtype: int8", "param_dtype must be one of auto, float32, bfloat16"),
        ("a: [", "not valid YAML"),
        ("- a", "expected lines of the form"),
    ],
)
def test_broken_yaml_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        FSDPConfig.read(str(path))
    assert expected in str(caught.value)


def test_replicas_must_divide_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("mesh: hsdp\nreplicas: 3\n")
    with pytest.raises(UserError, match="replicas is 3, but 2 process"):
        create_strategy(parse("--fsdp-config", str(tmp_path / "x.yaml")), TWO)


def test_residual_blocks_of_the_nets_are_found() -> None:
    from scalesnn import neuron, surrogate
    from scalesnn.model import ms_resnet, sew_resnet, spiking_resnet

    for module in (spiking_resnet, sew_resnet, ms_resnet):
        make = next(getattr(module, name) for name in module.__all__ if name.endswith("resnet18"))
        net = make(spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), num_classes=3)
        blocks = residual_blocks(net)
        assert len(blocks) == 8, module.__name__
        held = {id(p) for block in blocks for p in block.parameters()}
        assert sum(p.numel() for p in net.parameters() if id(p) in held) > 0.98 * sum(
            p.numel() for p in net.parameters()
        )
