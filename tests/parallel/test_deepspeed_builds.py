"""An optimizer that DeepSpeed cannot compile here: torch's Adam in its place, or one line."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from scalesnn.base import UserError
from scalesnn.parallel import Topology, add_parallel_arguments, create_strategy, deepspeed
from scalesnn.parallel.deepspeed_builds import build_problem, builder_of, use_writable_extensions_folder

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def config(kind: str, more: dict[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.1, **parameters}}, **(more or {})}


def strategy_of(settings: dict[str, Any], folder: Path) -> Any:
    """A DeepSpeed strategy that has found a GPU."""
    path = folder / "ds.json"
    path.write_text(json.dumps(settings))
    parser = argparse.ArgumentParser()
    add_parallel_arguments(parser)
    args = parser.parse_args(["--deepspeed_config", str(path)])
    for name, value in {
        "batch_size": 4,
        "lr": 0.1,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "opt": "sgd",
    }.items():
        setattr(args, name, value)
    args.lr_scheduler, args.lr_warmup_epochs = "cosa", 0
    made: Any = create_strategy(args, Topology())
    made.device = torch.device("cuda", 0)
    made.said = []
    made.notice = made.said.append
    return made


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (config("Adam"), "FusedAdamBuilder"),
        (config("AdamW", OFFLOAD), "CPUAdamBuilder"),
        (config("AdamW", torch_adam=True), None),
        (config("Lamb"), "FusedLambBuilder"),
        (config("Lion", OFFLOAD), "CPULionBuilder"),
        (config("SGD"), None),
        ({}, None),
        ({"optimizer": {"type": "Adam"}}, "FusedAdamBuilder"),
    ],
)
def test_what_deepspeed_would_compile(settings: dict[str, Any], expected: str | None) -> None:
    assert builder_of(settings) == expected


def test_without_nvcc_the_problem_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder  # the GPU's, which asks nvcc

    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    accelerator = type(get_accelerator())
    monkeypatch.setattr(accelerator, "create_op_builder", lambda self, name: FusedAdamBuilder())
    problem = build_problem("FusedAdamBuilder")
    assert problem is not None
    assert "CUDA_HOME" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("more", [{}, OFFLOAD], ids=["on the GPU", "offloaded"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_an_adam_that_does_not_compile_becomes_torchs(
    kind: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "build_problem", lambda builder: "no nvcc")
    strategy = strategy_of(config(kind, more), tmp_path)
    strategy._settle_optimizer()
    assert strategy.config["optimizer"]["params"]["torch_adam"] is True
    assert strategy.said == [
        f"DeepSpeed cannot compile its {kind} (no nvcc): torch's is used, with the same results"
    ]


def test_an_adam_that_compiles_is_deepspeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "build_problem", lambda builder: None)
    strategy = strategy_of(config("Adam"), tmp_path)
    strategy._settle_optimizer()
    assert "torch_adam" not in strategy.config["optimizer"]["params"]
    assert strategy.said == []


def test_one_process_a_machine_compiles_and_all_take_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(builder: str) -> None:
        raise AssertionError("only the first process of a machine compiles")

    monkeypatch.setattr(deepspeed, "build_problem", never)
    strategy = strategy_of(config("Adam"), tmp_path)
    strategy.topology = Topology(local_rank=1, rank=1, world_size=2, local_world_size=2)
    strategy.gather_objects = lambda own: ["no nvcc", own]
    strategy.is_main = False
    strategy._settle_optimizer()
    assert strategy.config["optimizer"]["params"]["torch_adam"] is True
    assert strategy.said == []


@pytest.mark.parametrize("settings", [config("Lamb"), config("Adam", torch_adam=False)])
def test_what_torch_cannot_stand_in_for_is_one_line(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "build_problem", lambda builder: "no nvcc")
    with pytest.raises(UserError, match=r"ds.json: DeepSpeed cannot compile its \w+: no nvcc; .* --opt"):
        strategy_of(settings, tmp_path)._settle_optimizer()


def test_extensions_go_to_our_cache_where_the_home_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/dev/null", "SCALESNN_CACHE": str(tmp_path / "cache")})
    use_writable_extensions_folder()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "cache" / "torch_extensions")
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    use_writable_extensions_folder()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
