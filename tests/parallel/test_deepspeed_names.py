"""Names and values in a DeepSpeed JSON that DeepSpeed would ignore, or end with a traceback."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from scalesnn.base import UserError
from scalesnn.parallel.deepspeed import check_nvme, import_deepspeed
from scalesnn.parallel.deepspeed_config import read_config, resolve_config
from scalesnn.parallel.deepspeed_names import check_names

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("zero*.json"))


@pytest.fixture(scope="module", autouse=True)
def deepspeed():
    return import_deepspeed(verbose=False)


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as a run with the default flags would use it."""
    args = argparse.Namespace(
        batch_size=4, lr=0.1, weight_decay=0.0, momentum=0.9, opt="sgd", lr_scheduler="cosa",
        lr_warmup_epochs=5, gradient_accumulation=1, clip_grad_norm=None, explicit=set(),
    )  # fmt: skip
    found = resolve_config(config, args, 2, path="x.json")
    check_names(found, "x.json")
    check_nvme(found, "x.json")
    return found


@pytest.mark.parametrize(
    ("config", "name", "meant"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation", "zero_optimization"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com", "overlap_comm"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devic": "cpu"}}},
            "zero_optimization.offload_param.devic",
            "device",
        ),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer.parms", "params"),
        ({"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.95]}}}, "optimizer.params.beta", "betas"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_step": 9}}},
            "scheduler.params.warmup_num_step",
            "warmup_num_steps",
        ),
        ({"torch_autocast": {"enabled": True, "dtyp": "bfloat16"}}, "torch_autocast.dtyp", "dtype"),
        ({"tensorboard": {"enabled": False, "jobname": "x"}}, "tensorboard.jobname", "job_name"),
        ({"gradient_cliping": 1.0}, "gradient_cliping", "gradient_clipping"),
        ({"checkpoint": {"tag_validaton": "Ignore"}}, "checkpoint.tag_validaton", "tag_validation"),
    ],
)
def test_a_misspelt_name_is_refused_at_every_level(config, name, meant):
    with pytest.raises(UserError) as caught:
        checked(config)
    assert f"x.json: DeepSpeed does not know '{name}'; did you mean '{meant}'?" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"optimizer": 3}, "optimizer must be an object {…}, got 3"),
        ({"optimizer": {"type": 3}}, "optimizer.type must be a name, got 3"),
        ({"scheduler": {"type": "WarmupLR", "params": []}}, "scheduler.params must be an object {…}, got []"),
        ({"torch_autocast": "yes"}, 'torch_autocast must be an object {…}, got "yes"'),
        ({"zero_optimization": {"stage": True}}, "stage must be 0, 1, 2 or 3, got true"),
        ({"zero_optimization": {"offload_param": {"device": "tape"}}}, "offload_param.device: input should"),
        ({"wall_clock_breakdown": "no"}, 'wall_clock_breakdown must be true or false, got "no"'),
        ({"steps_per_print": "often"}, "steps_per_print must be a whole number"),
        ({"amp": {"enabled": True}}, "AMP integration has been removed"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
            'scheduler.params.warmup_num_steps cannot be "auto"',
        ),
    ],
)
def test_values_of_another_kind_are_one_line(config, expected):
    with pytest.raises(UserError) as caught:
        checked(config)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offload_to_nvme_needs_a_folder_and_libaio(tmp_path, monkeypatch):
    def offload(folder: Path) -> dict[str, Any]:
        section = {"device": "nvme", "nvme_path": str(folder)}
        return {"zero_optimization": {"stage": 3, "offload_param": section}}

    with pytest.raises(UserError, match="nvme_path must be a folder"):
        checked(offload(tmp_path / "none"))
    monkeypatch.setenv("LDFLAGS", "-L/nonexistent")
    monkeypatch.setenv("CC", "/bin/false")  # what nobody can link with is not there
    with pytest.raises(UserError, match=r"nvme needs libaio, .*install libaio-dev"):
        checked(offload(tmp_path))


def test_auto_everywhere_takes_flags_and_defaults():
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    found = checked(
        {
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": auto},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
        }
    )
    assert found["optimizer"]["params"] == {"lr": 0.1, "weight_decay": 0.0}
    assert "auto" not in json.dumps(found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_files_and_comments_are_known(path):
    checked({"_comment": "mine", **read_config(str(path))})
