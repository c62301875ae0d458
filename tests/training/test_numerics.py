"""TF32 by a flag; the summary says on a GPU what precision and determinism cost."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch

from scalesnn.training.numerics import numerics_of, set_tf32

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def torchs_own() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def flags(tf32: bool = False, disable_uda: bool = False) -> argparse.Namespace:
    return argparse.Namespace(tf32=tf32, disable_uda=disable_uda)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_flag_sets_convolutions_and_matrices(enabled: bool) -> None:
    set_tf32(enabled)
    assert torch.backends.cuda.matmul.allow_tf32 is enabled
    assert torch.backends.cudnn.allow_tf32 is enabled


def test_on_a_gpu_the_summary_says_what_is_slow_and_what_would_be_faster() -> None:
    lines = numerics_of(flags(), GPU, torch.bfloat16)
    assert lines["precision"].startswith("bfloat16 autocast, float32 weights; other float32 products in full")
    assert "--tf32" in lines["precision"]
    assert lines["algorithms"].startswith("deterministic")
    assert "--disable-uda" in lines["algorithms"]


def test_on_a_gpu_the_summary_says_what_the_fast_settings_give_up() -> None:
    lines = numerics_of(flags(tf32=True, disable_uda=True), GPU, None)
    assert lines["precision"] == "float32; float32 products in TF32 (factors of 10 bits, sums in float32)"
    assert "two runs differ" in lines["algorithms"]


def test_on_a_cpu_there_is_nothing_to_say() -> None:
    assert numerics_of(flags(), torch.device("cpu"), None) == {"precision": "float32"}
