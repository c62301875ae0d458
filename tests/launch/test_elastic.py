"""--global-batch keeps the batch of an update on any number of devices."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalesnn.base import UserError
from scalesnn.training.elastic import add_elastic_arguments, apply_global_batch


def settings(
    global_batch: int | None, batch_size: int, accumulation: int = 1, explicit: set[str] = frozenset()
):
    parser = argparse.ArgumentParser()
    add_elastic_arguments(parser)
    args = parser.parse_args([] if global_batch is None else ["--global-batch", str(global_batch)])
    args.batch_size, args.gradient_accumulation, args.explicit = batch_size, accumulation, explicit
    return args


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 16))
def test_one_update_sees_the_global_batch(batch_size, devices, steps):
    args = settings(batch_size * devices * steps, batch_size)
    apply_global_batch(args, devices)
    assert args.gradient_accumulation * args.batch_size * devices == args.global_batch


def test_half_the_nodes_accumulate_twice_as_often():
    args = settings(1024, 32)
    apply_global_batch(args, 32)
    assert args.gradient_accumulation == 1
    apply_global_batch(args, 16)
    assert args.gradient_accumulation == 2


def test_without_the_flag_nothing_changes():
    args = settings(None, 32, accumulation=3)
    apply_global_batch(args, 7)
    assert args.gradient_accumulation == 3


def test_a_batch_that_does_not_divide_says_what_would():
    with pytest.raises(
        UserError, match=r"--global-batch 1024 is not a multiple of --batch-size 48 × 8 devices"
    ):
        apply_global_batch(settings(1024, 48), 8)
    with pytest.raises(UserError, match=r"--batch-size 8 or 16 or 32 would do"):
        apply_global_batch(settings(1024, 48), 8)
    with pytest.raises(UserError, match=r"24 devices cannot share 1024 images evenly"):
        apply_global_batch(settings(1024, 32), 24)


def test_an_accumulation_that_was_asked_for_must_agree():
    apply_global_batch(settings(64, 8, 4, {"gradient_accumulation"}), 2)
    with pytest.raises(UserError, match=r"--gradient-accumulation 3 contradicts --global-batch 64"):
        apply_global_batch(settings(64, 8, 3, {"gradient_accumulation"}), 2)
